//! What an adapter is: settings, targets, where its parameters lie. The arithmetic is in `ops::lora`; files are in
//! `checkpoint::adapter`.

use rand::{Rng, SeedableRng};
use std::ops::Range;

/// Rank, scale and dropout of one adapted module.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraConfig {
    /// Rank.
    pub r: usize,
    /// The update is scaled by `alpha / r`.
    pub alpha: f64,
    /// The update is scaled by `alpha / sqrt(r)` (rsLoRA, arXiv:2312.03732).
    pub rslora: bool,
    /// Share of the input that is dropped in training.
    pub dropout: f64,
}

impl LoraConfig {
    /// Factor on the update.
    #[must_use]
    pub fn scale(&self) -> f64 {
        let r = self.r as f64;
        self.alpha / if self.rslora { r.sqrt() } else { r }
    }
}

/// Which modules of a block are adapted, by LitGPT's switches.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Targets {
    /// q_proj.
    pub query: bool,
    /// k_proj.
    pub key: bool,
    /// v_proj.
    pub value: bool,
    /// o_proj.
    pub projection: bool,
    /// gate_proj, up_proj, down_proj, and where there are experts their router, `gate`.
    pub mlp: bool,
    /// lm_head.
    pub head: bool,
}

impl Targets {
    /// Whether the module `name`, as `model.layers.0.self_attn.q_proj`, is adapted.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        match name.rsplit('.').next().unwrap_or(name) {
            "q_proj" => self.query,
            "k_proj" => self.key,
            "v_proj" => self.value,
            "o_proj" => self.projection,
            "gate_proj" | "up_proj" | "down_proj" | "gate" => self.mlp,
            "lm_head" => self.head,
            _ => false,
        }
    }
}

/// The adapter of one module: its settings and where its matrices lie in the flat buffer of all adapters.
#[derive(Debug, Clone)]
pub struct Lora {
    /// Settings.
    pub config: LoraConfig,
    /// Elements of `A`: (r, in).
    pub a: Range<usize>,
    /// Elements of `B`: (out, r).
    pub b: Range<usize>,
}

/// Starting values: `A` uniform as `kaiming_uniform(a = sqrt(5))`, which is within `1 / sqrt(in)`, and `B` zero.
pub fn initialize(lora: &Lora, inputs: usize, seed: u64, parameters: &mut [f32]) {
    let bound = 1.0 / (inputs as f32).sqrt();
    // Seeded by its place, so that a module starts the same whatever else is adapted before it is drawn.
    let mut rng =
        rand_chacha::ChaCha8Rng::seed_from_u64(seed ^ (lora.a.start as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    parameters[lora.a.clone()].iter_mut().for_each(|v| *v = rng.random_range(-bound..bound));
    parameters[lora.b.clone()].fill(0.0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scale_is_alpha_over_r() {
        let config = LoraConfig { r: 4, alpha: 16.0, rslora: false, dropout: 0.0 };
        assert_eq!(config.scale(), 4.0);
        assert_eq!(LoraConfig { rslora: true, ..config }.scale(), 8.0);
    }

    #[test]
    fn a_is_uniform_and_b_zero() {
        let lora =
            Lora { config: LoraConfig { r: 8, alpha: 16.0, rslora: false, dropout: 0.0 }, a: 0..800, b: 800..880 };
        let mut p = vec![1.0; 880];
        initialize(&lora, 100, 1337, &mut p);
        assert!(p[..800].iter().all(|v| v.abs() <= 0.1) && p[..800].iter().any(|v| v.abs() > 0.09));
        assert!(p[800..].iter().all(|v| *v == 0.0));
        let again = p.clone();
        initialize(&lora, 100, 1337, &mut p);
        assert_eq!(p, again);
    }
}
