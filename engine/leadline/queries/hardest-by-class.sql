-- The ten points of each class that are decided deepest by the members that hold them out.
WITH p AS (SELECT architecture, max(n_probes) AS n_probes FROM members GROUP BY architecture),
hardest AS (
    SELECT *, row_number() OVER (
        PARTITION BY architecture, label ORDER BY mean_depth_held_out DESC, held_out_accuracy, point_id
    ) AS place
    FROM ensemble WHERE mean_depth_held_out IS NOT NULL QUALIFY place <= 10
)
SELECT architecture, hardest.label, label_name, place, point_id, key, part, n_held_out, mean_depth_held_out,
    mean_depth_held_out / n_probes AS relative_depth, held_out_accuracy, consensus_class
FROM hardest JOIN p USING (architecture) JOIN points USING (point_id)
ORDER BY architecture, hardest.label, place;
