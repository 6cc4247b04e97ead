-- The 100 points whose depth, held out and relative to the number of probes, differs most between architectures.
WITH p AS (SELECT architecture, max(n_probes) AS n_probes FROM members GROUP BY architecture),
depths_of AS (
    SELECT architecture, point_id, mean_depth_held_out / n_probes AS depth, consensus_class
    FROM ensemble JOIN p USING (architecture) WHERE mean_depth_held_out IS NOT NULL
),
apart AS (
    SELECT point_id, max(depth) - min(depth) AS difference FROM depths_of GROUP BY point_id HAVING count(*) > 1
    ORDER BY difference DESC, point_id LIMIT 100
)
SELECT point_id, key, any_value(label) AS label, any_value(label_name) AS label_name, any_value(part) AS part,
    difference,
    arg_max(architecture, depth ORDER BY architecture) AS deepest_in, max(depth) AS greatest_depth,
    arg_max(consensus_class, depth ORDER BY architecture) AS consensus_there,
    arg_min(architecture, depth ORDER BY architecture) AS least_deep_in, min(depth) AS least_depth,
    arg_min(consensus_class, depth ORDER BY architecture) AS consensus_here
FROM apart JOIN depths_of USING (point_id) JOIN points USING (point_id)
GROUP BY point_id, key, difference ORDER BY difference DESC, point_id;
