-- Which class is taken for which: points by label and by the other class that most members say of them held out.
WITH p AS (SELECT architecture, max(n_probes) AS n_probes FROM members GROUP BY architecture),
names AS (SELECT label, any_value(label_name) AS name FROM points GROUP BY label),
counted AS (
    SELECT architecture, label, count(*) AS of_label FROM ensemble WHERE n_held_out > 0 GROUP BY architecture, label
)
SELECT architecture, label, own.name AS label_name, consensus_class, other.name AS consensus_name, count(*) AS points,
    count(*) / any_value(of_label) AS share_of_label, avg(consensus_consistency) AS consensus_consistency,
    avg(mean_depth_held_out) / any_value(n_probes) AS relative_depth
FROM ensemble JOIN p USING (architecture) JOIN counted USING (architecture, label) JOIN names own USING (label)
    LEFT JOIN names other ON other.label = consensus_class
WHERE consensus_class >= 0 AND consensus_class <> label
GROUP BY architecture, label, own.name, consensus_class, other.name
ORDER BY architecture, points DESC, label, consensus_class;
