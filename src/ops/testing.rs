//! What the ops' tests share: seeded values, a comparison that names the worst element, and candle's autograd as oracle.

use candle_core::{Device, Tensor, Var};
use rand::{Rng, SeedableRng};

/// `n` values from (-1, 1).
pub fn random(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    (0..n).map(|_| rng.random_range(-1.0f32..1.0)).collect()
}

/// Fails when an element is off by more than `tolerance`, relative to the largest wanted one (at least 1).
#[track_caller]
pub fn assert_close(got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len(), "lengths differ");
    let scale = want.iter().fold(1.0f32, |m, v| m.max(v.abs()));
    let difference = |i: &usize| if got[*i].is_nan() { f32::INFINITY } else { (got[*i] - want[*i]).abs() };
    let worst = (0..got.len()).max_by(|a, b| difference(a).total_cmp(&difference(b)));
    if let Some(i) = worst {
        assert!(difference(&i) <= tolerance * scale, "element {i}: got {}, want {}, scale {scale}", got[i], want[i]);
    }
}

/// Forward and gradients of a reference in plain candle ops.
pub struct Oracle {
    /// Output elements.
    pub y: Vec<f32>,
    /// Gradient of each input.
    pub grads: Vec<Vec<f32>>,
}

impl Oracle {
    /// Runs `f` on `inputs` (values, rows, columns) and its autograd for an output gradient `dy`.
    pub fn run(
        inputs: &[(&[f32], usize, usize)],
        f: impl Fn(&[Tensor]) -> candle_core::Result<Tensor>,
        dy: &[f32],
    ) -> Self {
        let vars: Vec<Var> =
            inputs.iter().map(|(v, r, c)| Var::from_slice(v, (*r, *c), &Device::Cpu).unwrap()).collect();
        let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let y = f(&tensors).unwrap();
        let dy = Tensor::from_slice(dy, y.shape(), &Device::Cpu).unwrap();
        let grads = (&y * &dy).unwrap().sum_all().unwrap().backward().unwrap();
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        Self {
            y: flat(&y),
            grads: vars.iter().map(|v| flat(grads.get(v).expect("every input has a gradient"))).collect(),
        }
    }
}
