-- The 100 points that are unsettled in most members: the vote at the softmax is not what the network says.
WITH unsettled AS (
    SELECT *, (n_unsettled_training + n_unsettled_held_out) / (n_training + n_held_out) AS share,
        row_number() OVER (PARTITION BY architecture ORDER BY share DESC, point_id) AS place
    FROM ensemble WHERE n_unsettled_training + n_unsettled_held_out > 0 QUALIFY place <= 100
)
SELECT architecture, place, point_id, key, part, unsettled.label, label_name, n_unsettled_training,
    n_unsettled_held_out, share, mean_depth_held_out, consensus_class, held_out_accuracy
FROM unsettled JOIN points USING (point_id)
ORDER BY architecture, place;
