-- The 100 points that members get right when trained on them and wrong when not: accuracy in training less held out.
WITH p AS (SELECT architecture, max(n_probes) AS n_probes FROM members GROUP BY architecture),
trained AS (
    SELECT architecture, point_id, avg((prediction = label)::INTEGER) AS training_accuracy
    FROM depths JOIN members USING (member)
    WHERE in_training AND point_id IN (SELECT point_id FROM ensemble WHERE held_out_accuracy < 1)
    GROUP BY architecture, point_id
),
memorised AS (
    SELECT *, training_accuracy - held_out_accuracy AS memorisation, row_number() OVER (
        PARTITION BY architecture ORDER BY memorisation DESC, n_held_out DESC, mean_depth_training DESC, point_id
    ) AS place
    FROM ensemble JOIN trained USING (architecture, point_id) WHERE memorisation > 0 QUALIFY place <= 100
)
SELECT architecture, place, point_id, key, part, memorised.label, label_name, n_training, n_held_out, training_accuracy,
    held_out_accuracy, memorisation, consensus_class, mean_depth_training / n_probes AS relative_depth_training,
    mean_depth_held_out / n_probes AS relative_depth_held_out
FROM memorised JOIN p USING (architecture) JOIN points USING (point_id)
ORDER BY architecture, place;
