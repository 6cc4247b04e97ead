-- Labels to look at: three in four, of two or more who hold the point out, say one other class, or it is very deep.
-- Very deep: in training, beyond 0.99 of the architecture's points. First those of both, then the most contradicted.
WITH p AS (SELECT architecture, max(n_probes) AS n_probes FROM members GROUP BY architecture),
limits AS (
    SELECT architecture, quantile_cont(mean_depth_training, 0.99) AS deep FROM ensemble GROUP BY architecture
),
names AS (SELECT label, any_value(label_name) AS consensus_name FROM points GROUP BY label),
marked AS (
    SELECT *, n_held_out > 1 AND consensus_class <> label AND consensus_consistency >= 0.75 AS contradicted,
        coalesce(mean_depth_training > deep, false) AS deep_in_training
    FROM ensemble JOIN limits USING (architecture) WHERE contradicted OR deep_in_training
)
SELECT architecture, point_id, key, part, marked.label, label_name, consensus_class, consensus_name, clean_label,
    contradicted, deep_in_training, n_held_out, consensus_consistency,
    mean_depth_training / n_probes AS relative_depth_training, held_out_accuracy
FROM marked JOIN p USING (architecture) JOIN points USING (point_id) LEFT JOIN names ON names.label = consensus_class
ORDER BY architecture, contradicted AND deep_in_training DESC, contradicted DESC,
    round(consensus_consistency * n_held_out) DESC, relative_depth_training DESC NULLS LAST, point_id;
