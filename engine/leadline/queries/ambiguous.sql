-- The 100 points that are deep both held out and in training and whose class the members agree least about.
-- Deep: beyond 0.75 of the architecture's points, as in leadline study.
WITH p AS (SELECT architecture, max(n_probes) AS n_probes FROM members GROUP BY architecture),
limits AS (
    SELECT architecture, quantile_cont(mean_depth_held_out, 0.75) AS held_out,
        quantile_cont(mean_depth_training, 0.75) AS training
    FROM ensemble WHERE mean_depth_held_out IS NOT NULL AND mean_depth_training IS NOT NULL GROUP BY architecture
),
ambiguous AS (
    SELECT *, row_number() OVER (
        PARTITION BY architecture
        ORDER BY consensus_consistency, mean_depth_held_out + mean_depth_training DESC, point_id
    ) AS place
    FROM ensemble JOIN limits USING (architecture)
    WHERE mean_depth_held_out > held_out AND mean_depth_training > training QUALIFY place <= 100
)
SELECT architecture, place, point_id, key, part, ambiguous.label, label_name, consensus_class, consensus_consistency,
    held_out_accuracy, mean_depth_held_out / n_probes AS relative_depth_held_out,
    mean_depth_training / n_probes AS relative_depth_training
FROM ambiguous JOIN p USING (architecture) JOIN points USING (point_id)
ORDER BY architecture, place;
