//! How well a score tells two classes apart.

/// Area under the ROC curve: the probability that a random positive scores higher than a random negative, ties counting
/// half (the Mann-Whitney U statistic). `None` if a class is empty.
pub fn roc_auc(scores: &[f32], positive: &[bool]) -> Option<f64> {
    assert_eq!(scores.len(), positive.len());
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*a].total_cmp(&scores[*b]));
    let positives = positive.iter().filter(|p| **p).count() as f64;
    let negatives = scores.len() as f64 - positives;
    let (mut rank_sum, mut first) = (0.0, 0);
    while first < order.len() {
        let tied = order[first..].iter().take_while(|i| scores[**i] == scores[order[first]]).count().max(1);
        // Ranks count from 1; tied scores share the mean of theirs.
        let rank = first as f64 + (tied as f64 + 1.0) / 2.0;
        rank_sum += rank * order[first..first + tied].iter().filter(|i| positive[**i]).count() as f64;
        first += tied;
    }
    let u = rank_sum - positives * (positives + 1.0) / 2.0;
    (positives > 0.0 && negatives > 0.0).then(|| u / (positives * negatives))
}

/// Precision and recall of `score >= threshold` for the positives. `None` where nothing is predicted or true.
pub fn precision_recall(scores: &[f32], positive: &[bool], threshold: f32) -> (Option<f64>, Option<f64>) {
    let predicted = scores.iter().filter(|s| **s >= threshold).count();
    let hits = scores.iter().zip(positive).filter(|(s, p)| **s >= threshold && **p).count();
    let positives = positive.iter().filter(|p| **p).count();
    let share = |of: usize| (of > 0).then(|| hits as f64 / of as f64);
    (share(predicted), share(positives))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auc_counts_ordered_pairs() {
        assert_eq!(roc_auc(&[0.1, 0.4, 0.35, 0.8], &[false, false, true, true]), Some(0.75));
        assert_eq!(roc_auc(&[1.0, 2.0, 3.0], &[false, true, true]), Some(1.0));
        assert_eq!(roc_auc(&[3.0, 2.0, 1.0], &[false, true, true]), Some(0.0));
        assert_eq!(roc_auc(&[5.0; 4], &[false, true, false, true]), Some(0.5));
        assert_eq!(roc_auc(&[1.0, 1.0, 2.0], &[true, false, true]), Some(0.75));
        assert_eq!(roc_auc(&[1.0, 2.0], &[true, true]), None);
        assert_eq!(roc_auc(&[], &[]), None);
    }

    #[test]
    fn precision_and_recall_at_a_threshold() {
        let (scores, positive) = ([0.9, 0.6, 0.5, 0.2], [true, false, true, true]);
        assert_eq!(precision_recall(&scores, &positive, 0.5), (Some(2.0 / 3.0), Some(2.0 / 3.0)));
        assert_eq!(precision_recall(&scores, &positive, 0.95), (None, Some(0.0)));
        assert_eq!(precision_recall(&[0.3], &[false], 0.1), (Some(0.0), None));
    }
}
