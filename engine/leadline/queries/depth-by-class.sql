-- Mean depth of each class, held out and in training, with the members' accuracy and agreement.
WITH p AS (SELECT architecture, max(n_probes) AS n_probes FROM members GROUP BY architecture)
SELECT architecture, label, label_name, count(*) AS points, avg(mean_depth_held_out) AS mean_depth_held_out,
    avg(mean_depth_training) AS mean_depth_training, avg(mean_depth_held_out) / any_value(n_probes) AS relative_depth,
    avg(held_out_accuracy) AS held_out_accuracy, avg(consensus_consistency) AS consensus_consistency
FROM ensemble JOIN p USING (architecture) JOIN (SELECT DISTINCT label, label_name FROM points) USING (label)
GROUP BY architecture, label, label_name
ORDER BY architecture, mean_depth_held_out DESC NULLS LAST, label;
