-- The members: their accuracy, their mean depth in training and held out, and how often their last probe disagrees.
WITH of_member AS (
    SELECT member, avg(depth) FILTER (in_training) AS mean_depth_training,
        avg(depth) FILTER (NOT in_training) AS mean_depth_held_out, avg(unsettled::INTEGER) AS unsettled
    FROM depths GROUP BY member
)
SELECT member, architecture, seed, n_train, n_held_out, n_probes, train_accuracy, held_out_accuracy,
    mean_depth_training, mean_depth_held_out, unsettled
FROM members JOIN of_member USING (member) ORDER BY architecture, member;
