//! The factor on the loss of a run whose activations are f16: without it small gradients become zero, with too large a one
//! they become infinite (Micikevicius et al. 2018, arXiv:1710.03740). It is a power of two, so that it changes no digit of
//! a gradient that has room. A step whose gradient is infinite is taken again with half of it, and is not lost.

use serde::{Deserialize, Serialize};

/// Updates after which a larger factor is tried.
const PATIENCE: u32 = 1000;
/// The largest factor that is tried.
const MOST: f32 = 65_536.0;
/// The least: a step that needs a smaller one has another problem.
const LEAST: f32 = 1.0 / 1024.0;

/// A factor on the loss, and the updates since it last changed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LossScale {
    factor: f32,
    updates: u32,
}

impl Default for LossScale {
    /// The loss of a step is a sum over its tokens; as a factor on their mean this is some 2¹⁶.
    fn default() -> Self {
        Self::new(256.0)
    }
}

impl LossScale {
    /// Begins with this factor, a power of two.
    #[must_use]
    pub fn new(factor: f32) -> Self {
        Self { factor, updates: 0 }
    }

    /// The factor.
    #[must_use]
    pub fn factor(&self) -> f32 {
        self.factor
    }

    /// Halves the factor after an infinite gradient; whether the step shall be taken again.
    pub fn lower(&mut self) -> bool {
        let again = self.factor > LEAST;
        if again {
            *self = Self::new(self.factor / 2.0);
        }
        again
    }

    /// Counts an update, and doubles the factor after enough of them.
    pub fn count_update(&mut self) {
        self.updates += 1;
        if self.updates >= PATIENCE {
            *self = Self::new((self.factor * 2.0).min(MOST));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_falls_at_once_and_rises_slowly() {
        let mut scale = LossScale::default();
        assert!(scale.lower() && scale.factor() == 128.0);
        (1..PATIENCE).for_each(|_| scale.count_update());
        assert_eq!(scale.factor(), 128.0);
        scale.count_update();
        assert_eq!(scale, LossScale::default());
        (0..20 * PATIENCE).for_each(|_| scale.count_update());
        assert_eq!(scale.factor(), MOST);
        assert_eq!((0..100).filter(|_| scale.lower()).count(), 26, "from 2¹⁶ to 2⁻¹⁰");
    }
}
