//! The learning rate of each step: linear warm-up, then a cosine to `min_lr` or what else `train.lr_schedule` says.

use super::Plan;
use super::settings::{FinetuneSettings, LrSchedule};

/// Learning rate as a pure function of the step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// Steps of the warm-up.
    pub warmup: usize,
    /// Steps in all; of LitGPT's schedule those that it counts.
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
    /// The schedule of a run. A warm-up of more than half of it, which would hardly reach the rate that was asked for,
    /// becomes a tenth of the run, but in LitGPT's schedule.
    #[must_use]
    pub fn new(settings: &FinetuneSettings, plan: &Plan) -> Self {
        let train = &settings.train;
        let kind = train.lr_schedule;
        let steps = if kind == LrSchedule::Litgpt { plan.whole_steps } else { plan.steps };
        let asked = match train.lr_warmup_fraction {
            Some(fraction) => (fraction * steps as f64).round() as usize,
            None => train.lr_warmup_steps.unwrap_or(0),
        };
        let own = kind != LrSchedule::Litgpt && train.lr_warmup_fraction.is_none();
        let too_long = own && 2 * asked > steps && asked > (steps / 10).max(1);
        let warmup = if too_long { (steps / 10).max(1) } else { asked };
        let peak = settings.optimizer.learning_rate;
        let shortened_from = too_long.then_some(asked);
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
        let progress = (step - self.warmup) as f64 / self.steps.abs_diff(self.warmup).max(1) as f64;
        let cosine = |progress: f64| 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
        let left = match self.kind {
            LrSchedule::Cosine => cosine(progress.min(1.0)),
            // The windows that it does not count lie behind the cosine's end, where the rate rises again.
            LrSchedule::Litgpt => cosine(progress),
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
        Schedule::new(&settings, &Plan { accumulate: 1, iters: steps, steps, whole_steps: steps })
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

    /// Rates of PyTorch's LambdaLR and CosineAnnealingLR, joined as LitGPT joins them.
    #[test]
    fn litgpts_schedule_counts_whole_windows_and_keeps_its_warmup() {
        let rates = |samples: usize, epochs: usize, warmup: usize| {
            let mut settings = FinetuneSettings::default();
            settings.optimizer.learning_rate = 1e-3;
            let train = &mut settings.train;
            (train.global_batch_size, train.epochs, train.lr_warmup_steps) = (4, Some(epochs), Some(warmup));
            train.lr_schedule = LrSchedule::Litgpt;
            let plan = Plan::new(&settings, samples).unwrap();
            let schedule = Schedule::new(&settings, &plan);
            assert_eq!(schedule.shortened_from, None);
            (0..plan.steps).map(|step| (schedule.at(step) * 1e7).round() as i64).collect::<Vec<_>>()
        };
        assert_eq!(rates(38, 1, 2), [0, 5000, 10000, 9505, 8117, 6113, 3887, 1883, 495, 0]);
        assert_eq!(rates(38, 1, 8), [0, 1250, 2500, 3750, 5000, 6250, 7500, 8750, 10000, 0]);
        assert_eq!(rates(6, 3, 1), [0, 10000, 5000, 0, 5000]);
    }

    #[test]
    fn a_warmup_longer_than_the_run_is_shortened() {
        let s = schedule(100, 30);
        assert_eq!((s.warmup, s.shortened_from), (3, Some(100)));
        assert_eq!(s.at(2), 1e-3);
        assert_eq!(schedule(0, 1).at(0), 1e-3);
    }
}
