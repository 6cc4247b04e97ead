-- How many points of each class are easy, ambiguous, or look like another class, by depth held out and in training.
-- Deep: beyond 0.75 of the architecture's points, as in leadline study.
WITH limits AS (
    SELECT architecture, quantile_cont(mean_depth_held_out, 0.75) AS held_out,
        quantile_cont(mean_depth_training, 0.75) AS training
    FROM ensemble WHERE mean_depth_held_out IS NOT NULL AND mean_depth_training IS NOT NULL GROUP BY architecture
),
placed AS (
    SELECT architecture, label, mean_depth_held_out > held_out AS is_deep_held_out,
        mean_depth_training > training AS is_deep_in_training
    FROM ensemble JOIN limits USING (architecture)
    WHERE mean_depth_held_out IS NOT NULL AND mean_depth_training IS NOT NULL
)
SELECT architecture, label, label_name, count(*) AS points,
    count(*) FILTER (NOT is_deep_held_out AND NOT is_deep_in_training) AS easy,
    count(*) FILTER (NOT is_deep_held_out AND is_deep_in_training) AS looks_like_a_different_class,
    count(*) FILTER (is_deep_held_out AND NOT is_deep_in_training) AS ambiguous_unless_the_label_is_given,
    count(*) FILTER (is_deep_held_out AND is_deep_in_training) AS ambiguous
FROM placed JOIN (SELECT DISTINCT label, label_name FROM points) USING (label)
GROUP BY architecture, label, label_name ORDER BY architecture, label;
