-- The 100 points that networks learn last where their training was watched, with depth and forgetting beside it.
SELECT architecture, point_id, key, part, points.label, label_name, count(*) AS members,
    avg(iteration_learned) AS iteration_learned, avg(forgetting_events) AS forgetting_events,
    avg(depth) AS mean_depth_training
FROM learning JOIN members USING (member) JOIN depths USING (member, point_id) JOIN points USING (point_id)
WHERE learning.in_training
GROUP BY architecture, point_id, key, part, points.label, label_name
QUALIFY row_number() OVER (
    PARTITION BY architecture ORDER BY avg(iteration_learned) DESC, avg(forgetting_events) DESC, point_id
) <= 100
ORDER BY architecture, avg(iteration_learned) DESC, avg(forgetting_events) DESC, point_id;
