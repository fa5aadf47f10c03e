//! Where a run stands between two optimizer steps, and what it counts on the way: the best validation, validations
//! without a better one, skipped steps. All of it is saved, so that a resumed run decides as the undisturbed one does.

use super::LossScale;
use serde::{Deserialize, Serialize};

/// Where a run stands. Learning rate, order of the data and dropout follow from it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Steps so far, the skipped ones too.
    pub step: usize,
    /// Micro batches trained on.
    pub iter: usize,
    /// Tokens trained on.
    pub tokens: u64,
    /// Duration of the training so far, without validation and saving.
    pub seconds: f64,
    /// Lowest validation loss so far.
    pub best: Option<f64>,
    /// Step after which it was measured.
    #[serde(default)]
    pub best_step: usize,
    /// Validations since then.
    #[serde(default)]
    pub without_improvement: usize,
    /// Steps without an update, as loss or gradient were no finite numbers.
    #[serde(default)]
    pub skipped: usize,
    /// Those of them since the last update.
    #[serde(default)]
    pub skipped_in_a_row: usize,
    /// Factor on the loss, where the activations are f16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<LossScale>,
}

impl Progress {
    /// Updates of the parameters.
    #[must_use]
    pub fn updates(&self) -> u64 {
        (self.step - self.skipped.min(self.step)) as u64
    }

    /// Factor on the loss whose gradient is taken.
    #[must_use]
    pub fn loss_factor(&self) -> f32 {
        self.loss_scale.map_or(1.0, |scale| scale.factor())
    }

    /// Counts a step.
    pub fn count_step(&mut self, updated: bool) {
        self.step += 1;
        if updated {
            self.skipped_in_a_row = 0;
            self.loss_scale.iter_mut().for_each(LossScale::count_update);
        } else {
            self.skipped += 1;
            self.skipped_in_a_row += 1;
        }
    }

    /// Takes note of a validation loss; whether it is the lowest so far.
    pub fn count_validation(&mut self, loss: f64) -> bool {
        let lowest = self.best.is_none_or(|best| loss < best);
        if lowest {
            (self.best, self.best_step, self.without_improvement) = (Some(loss), self.step, 0);
        } else {
            self.without_improvement += 1;
        }
        lowest
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_a_lower_loss_is_better() {
        let mut at = Progress { step: 3, ..Progress::default() };
        assert!(at.count_validation(2.0));
        at.step = 6;
        assert!(!at.count_validation(2.0) && !at.count_validation(2.5));
        assert_eq!((at.best, at.best_step, at.without_improvement), (Some(2.0), 3, 2));
        assert!(at.count_validation(1.5));
        assert_eq!((at.best_step, at.without_improvement), (6, 0));
    }

    #[test]
    fn skipped_steps_are_steps_but_no_updates() {
        let mut at = Progress::default();
        [true, false, false, true, false].into_iter().for_each(|updated| at.count_step(updated));
        assert_eq!((at.step, at.updates(), at.skipped, at.skipped_in_a_row), (5, 2, 3, 1));
    }

    /// Else a loss equal to the best one could count as lower after resuming.
    #[test]
    fn a_recorded_loss_is_read_back_to_the_last_bit() {
        for bits in [0x4000_0000_0000_0001, 0x3ff5_5555_5555_5555, 0x4009_21fb_5444_2d18, 0x3fb9_9999_9999_999a] {
            for ulp in 0..200 {
                let at = Progress { best: Some(f64::from_bits(bits + ulp)), ..Progress::default() };
                assert_eq!(serde_json::from_str::<Progress>(&serde_json::to_string(&at).unwrap()).unwrap(), at);
            }
        }
    }

    #[test]
    fn states_of_earlier_versions_are_read() {
        let old = r#"{"step": 3, "iter": 6, "tokens": 90, "seconds": 1.5, "best": 2.5}"#;
        assert_eq!(serde_json::from_str::<Progress>(old).unwrap().best, Some(2.5));
        assert!(serde_json::from_str::<Progress>("{}").is_err());
    }
}
