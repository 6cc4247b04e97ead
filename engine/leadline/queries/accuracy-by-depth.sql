-- How often networks are right at each depth: pairs of a point and a member, in training and held out.
SELECT architecture, depth, count(*) FILTER (in_training) AS training, count(*) FILTER (NOT in_training) AS held_out,
    avg((prediction = label)::DOUBLE) FILTER (in_training) AS training_accuracy,
    avg((prediction = label)::DOUBLE) FILTER (NOT in_training) AS held_out_accuracy,
    avg(confidence::DOUBLE) FILTER (NOT in_training) AS held_out_confidence
FROM depths JOIN members USING (member)
GROUP BY architecture, depth ORDER BY architecture, depth;
