//! The learning rate of each step: linear warm-up, then a cosine to `min_lr` or what else `train.lr_schedule` says.

use super::settings::{FinetuneSettings, LrSchedule};

/// Learning rate as a pure function of the step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// Steps of the warm-up.
    pub warmup: usize,
    /// Steps in all.
    pub steps: usize,
    /// Highest rate.
    pub peak: f64,
    /// Rate at the end.
    pub floor: f64,
    /// How it goes after the warm-up.
    pub kind: LrSchedule,
    /// The warm-up that was asked for, where the run is too short for it.
    pub shortened_from: Option<usize>,
}

impl Schedule {
    /// The schedule of a run of `steps` steps. A warm-up of more than half the run, which would hardly reach the rate
    /// that was asked for, becomes a tenth of the run.
    #[must_use]
    pub fn new(settings: &FinetuneSettings, steps: usize) -> Self {
        let train = &settings.train;
        let asked = match train.lr_warmup_fraction {
            Some(fraction) => (fraction * steps as f64).round() as usize,
            None => train.lr_warmup_steps.unwrap_or(0),
        };
        let too_long = 2 * asked > steps && asked > (steps / 10).max(1) && train.lr_warmup_fraction.is_none();
        let warmup = if too_long { (steps / 10).max(1) } else { asked };
        let peak = settings.optimizer.learning_rate;
        let shortened_from = too_long.then_some(asked);
        let kind = train.lr_schedule;
        let floor = if kind == LrSchedule::Litgpt { 0.0 } else { train.min_lr.min(peak) };
        Self { warmup, steps, peak, floor, kind, shortened_from }
    }

    /// Learning rate of step `step`, counted from 0.
    #[must_use]
    pub fn at(&self, step: usize) -> f64 {
        if step < self.warmup {
            let begun = if self.kind == LrSchedule::Litgpt { step } else { step + 1 };
            return self.peak * begun as f64 / self.warmup as f64;
        }
        let progress = (step - self.warmup) as f64 / (self.steps - self.warmup).max(1) as f64;
        let left = match self.kind {
            LrSchedule::Cosine | LrSchedule::Litgpt => 0.5 * (1.0 + (std::f64::consts::PI * progress.min(1.0)).cos()),
            LrSchedule::Linear => 1.0 - progress.min(1.0),
            LrSchedule::Constant => 1.0,
        };
        self.floor + (self.peak - self.floor) * left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(warmup: usize, steps: usize) -> Schedule {
        let mut settings = FinetuneSettings::default();
        settings.train.lr_warmup_steps = Some(warmup);
        settings.optimizer.learning_rate = 1e-3;
        settings.train.min_lr = 1e-4;
        Schedule::new(&settings, steps)
    }

    #[test]
    fn warms_up_and_falls_to_the_floor() {
        let s = schedule(4, 20);
        assert_eq!((s.at(0), s.at(3), s.at(4)), (0.25e-3, 1e-3, 1e-3));
        assert!((s.at(12) - 5.5e-4).abs() < 1e-12);
        assert!(s.at(19) > 1e-4 && s.at(20) == 1e-4);
    }

    #[test]
    fn other_schedules_go_their_way() {
        let s = schedule(4, 20);
        let kind = |kind| Schedule { kind, ..s };
        assert_eq!(kind(LrSchedule::Constant).at(19), 1e-3);
        assert!((kind(LrSchedule::Linear).at(12) - 5.5e-4).abs() < 1e-12);
        // LitGPT: LambdaLR(step / warmup), then CosineAnnealingLR to 0 over the rest.
        let litgpt = Schedule { floor: 0.0, ..kind(LrSchedule::Litgpt) };
        assert_eq!((litgpt.at(0), litgpt.at(2), litgpt.at(4)), (0.0, 0.5e-3, 1e-3));
        assert!((litgpt.at(12) - 5e-4).abs() < 1e-12);
    }

    #[test]
    fn a_warmup_longer_than_the_run_is_shortened() {
        let s = schedule(100, 30);
        assert_eq!((s.warmup, s.shortened_from), (3, Some(100)));
        assert_eq!(s.at(2), 1e-3);
        assert_eq!(schedule(0, 1).at(0), 1e-3);
    }
}
