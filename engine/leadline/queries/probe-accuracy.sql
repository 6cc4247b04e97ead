-- Accuracy of the votes at each probe, mean over members; null where a member has no value.
SELECT architecture, probe, name, any_value(width) AS width, count(*) AS members,
    CASE WHEN count(train_accuracy) = count(*) THEN avg(train_accuracy) END AS train_accuracy,
    CASE WHEN count(held_out_accuracy) = count(*) THEN avg(held_out_accuracy) END AS held_out_accuracy
FROM probes GROUP BY architecture, probe, name ORDER BY architecture, probe, name;
