-- The ten points of each class that all who hold them out get right, least deep first, then most confident.
WITH p AS (SELECT architecture, max(n_probes) AS n_probes FROM members GROUP BY architecture),
easiest AS (
    SELECT *, row_number() OVER (
        PARTITION BY architecture, label ORDER BY mean_depth_held_out, mean_confidence_held_out DESC, point_id
    ) AS place
    FROM ensemble WHERE held_out_accuracy = 1 QUALIFY place <= 10
)
SELECT architecture, easiest.label, label_name, place, point_id, key, part, n_held_out, mean_depth_held_out,
    mean_depth_held_out / n_probes AS relative_depth, mean_confidence_held_out
FROM easiest JOIN p USING (architecture) JOIN points USING (point_id)
ORDER BY architecture, easiest.label, place;
