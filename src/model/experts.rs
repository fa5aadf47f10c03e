//! A router over gated experts as the MLP of a block. The routing is in `ops::moe`, an expert in `mlp`.
//!
//! Gradient flows through the shares that the router gives, to its adapter and the input. Each expert sees the rows
//! that visit it, end to end.

use super::attention::Pass;
use super::linear::{Gradients, Linear, Saved as LinearSaved};
use super::mlp::{Dense, DenseSaved};
use crate::ops::Matrix;
use crate::ops::device::Dtype;
use crate::ops::moe::{Routing, Visits};
use crate::ops::rows::{add_scaled, cast, gather, scatter_add};
use std::cell::LazyCell;

/// `y = Σ share · expert(x)` over the experts that a row visits.
#[derive(Debug, Clone)]
pub struct Experts {
    /// Router: (experts, n_embd).
    pub router: Linear,
    /// The experts.
    pub experts: Vec<Dense>,
    /// Experts that a row visits.
    pub n_expert_per_token: usize,
    /// Whether the visited experts' shares are scaled to sum to 1.
    pub norm_topk: bool,
}

/// What the backward needs besides the input.
#[derive(Debug)]
pub struct Saved {
    routing: Routing,
    router_h: LinearSaved,
    visited: Vec<Visited>,
}

/// What an expert that was visited saves.
#[derive(Debug)]
struct Visited {
    expert: usize,
    visits: Visits,
    dense: DenseSaved,
    out: Matrix,
}

impl Experts {
    /// `y = Σ share · expert(x)`, added to `y` where `accumulate`.
    ///
    /// # Shapes
    /// `x`, `y`: (T, n_embd).
    pub fn forward(&self, pass: &Pass<'_>, x: &Matrix, y: &mut Matrix, accumulate: bool) -> Saved {
        if !accumulate {
            y.zero();
        }
        let exact = x.place().is_some().then(|| cast(x, Dtype::F32));
        let exact = exact.as_ref().unwrap_or(x);
        let mut logits = exact.new_like(x.rows(), self.experts.len());
        let router_h = self.router.forward(pass.exact, exact, pass.seed, &mut logits, false);
        let routing = Routing::new(&logits, self.n_expert_per_token, self.norm_topk);
        let mut visited = Vec::new();
        for (expert, visits) in routing.visits().into_iter().enumerate().filter(|(_, v)| !v.rows.is_empty()) {
            let mut out = x.new_like(visits.rows.len(), x.cols());
            let dense = self.experts[expert].forward(pass, &gather(x, &visits.rows), &mut out, false);
            routing.add_to(&out, &visits, y);
            visited.push(Visited { expert, visits, dense, out });
        }
        Saved { routing, router_h, visited }
    }

    /// Adds the adapters' gradients; writes or adds that of the input where `dx` is asked for.
    ///
    /// # Shapes
    /// `dy`, `dx`: (T, n_embd).
    pub fn backward(
        &self,
        pass: &Pass<'_>,
        to: &mut Gradients<'_>,
        dy: &Matrix,
        x: impl FnOnce() -> Matrix,
        saved: Saved,
        mut dx: Option<(&mut Matrix, bool)>,
    ) {
        let x = LazyCell::new(x);
        let Saved { routing, router_h, visited } = saved;
        let mut d_shares = routing.d_shares();
        if let Some((dx, false)) = &mut dx {
            dx.zero();
        }
        for Visited { expert, visits, dense, out } in visited {
            let d_out = routing.add_to_backward(dy, &out, &visits, &mut d_shares);
            let mut d_in = dx.is_some().then(|| dy.new_like(visits.rows.len(), dy.cols()));
            let rows = || gather(&x, &visits.rows);
            self.experts[expert].backward(pass, to, &d_out, rows, dense, d_in.as_mut().map(|d| (d, false)));
            if let (Some((dx, _)), Some(d_in)) = (&mut dx, &d_in) {
                scatter_add(d_in, &visits.rows, None, dx);
            }
        }
        if dx.is_none() && !self.router.adapted() {
            return;
        }
        let d_logits = routing.backward(&d_shares);
        let mut to = Gradients { parameters: pass.exact, grads: to.grads, past: None };
        let on_device = dy.place().is_some();
        let exact = || if on_device { cast(&x, Dtype::F32) } else { x.clone() };
        let Some((dx, _)) = dx else {
            return self.router.backward(&mut to, &d_logits, exact, &router_h, pass.seed, None);
        };
        if !on_device {
            return self.router.backward(&mut to, &d_logits, exact, &router_h, pass.seed, Some((dx, true)));
        }
        let mut d = d_logits.new_like(dx.rows(), dx.cols());
        self.router.backward(&mut to, &d_logits, exact, &router_h, pass.seed, Some((&mut d, false)));
        add_scaled(dx, &d, 1.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::linear::Linear;
    use crate::model::lora::LoraConfig;
    use crate::ops::attention::Spans;
    use crate::ops::glu::Activation;
    use crate::ops::rope::{Scaling, Tables};
    use crate::ops::testing::{Oracle, assert_close, random};
    use crate::ops::weight::{Data, Weight};
    use candle_core::{D, Device, Tensor};
    use std::sync::Arc;

    const T: usize = 7;
    const C: usize = 6;
    const WIDTH: usize = 10;
    const N_EXPERT: usize = 4;
    /// alpha is not r.
    const LORA: LoraConfig = LoraConfig { r: 3, alpha: 5.0, rslora: false, dropout: 0.0 };

    fn weight(rows: usize, cols: usize, seed: u64) -> Weight {
        Weight::new(rows, cols, Data::F32(random(rows * cols, seed)))
    }

    fn dense(expert: usize) -> Dense {
        let (name, seed) = (format!("experts.{expert}"), 10 * expert as u64);
        let parts = [(format!("{name}.gate_proj"), WIDTH), (format!("{name}.up_proj"), WIDTH)];
        let up = Linear::new(Arc::new(weight(2 * WIDTH, C, seed)), None, &parts);
        let down = Linear::new(Arc::new(weight(C, WIDTH, seed + 1)), None, &[(format!("{name}.down_proj"), C)]);
        Dense { up, down, activation: Activation::Silu }
    }

    /// Inputs: x, then `A` and `B` of gate, up and down of each expert, and of the router.
    fn reference(experts: &Experts, inputs: &[Tensor]) -> candle_core::Result<Tensor> {
        let tensor = |w: &Weight| {
            let mut values = vec![0.0; w.rows() * w.cols()];
            w.decode_rows(0..w.rows(), &mut values);
            Tensor::from_vec(values, (w.rows(), w.cols()), &Device::Cpu)
        };
        let x = &inputs[0];
        let [a, b] = [&inputs[inputs.len() - 2], &inputs[inputs.len() - 1]];
        let router = (tensor(experts.router.weight())? + (b.matmul(a)? * LORA.scale())?)?;
        let p = candle_nn::ops::softmax(&x.matmul(&router.t()?)?, D::Minus1)?;
        let order = p.arg_sort_last_dim(false)?.to_vec2::<u32>()?;
        let chosen = order.iter().flat_map(|o| (0..N_EXPERT).map(|e| o[..2].contains(&(e as u32)) as u32 as f32));
        let mut shares = (&p * Tensor::from_iter(chosen, &Device::Cpu)?.reshape((T, N_EXPERT))?)?;
        if experts.norm_topk {
            shares = shares.broadcast_div(&shares.sum_keepdim(1)?)?;
        }
        let mut y = x.zeros_like()?;
        for (e, expert) in experts.experts.iter().enumerate() {
            let adapted = |w: Tensor, i: usize| {
                let at = 1 + 6 * e + 2 * i;
                w + (inputs[at + 1].matmul(&inputs[at])? * LORA.scale())?
            };
            let up = tensor(expert.up.weight())?;
            let gate = x.matmul(&adapted(up.narrow(0, 0, WIDTH)?, 0)?.t()?)?.silu()?;
            let up = x.matmul(&adapted(up.narrow(0, WIDTH, WIDTH)?, 1)?.t()?)?;
            let out = (gate * up)?.matmul(&adapted(tensor(expert.down.weight())?, 2)?.t()?)?;
            y = (y + out.broadcast_mul(&shares.narrow(1, e, 1)?)?)?;
        }
        Ok(y)
    }

    #[test]
    fn adapted_experts_equal_the_reference() {
        for norm_topk in [true, false] {
            let name = "model.layers.0.mlp.gate".to_owned();
            let router = Linear::new(Arc::new(weight(N_EXPERT, C, 99)), None, &[(name, N_EXPERT)]);
            let mut experts =
                Experts { router, experts: (0..N_EXPERT).map(dense).collect(), n_expert_per_token: 2, norm_topk };
            let mut len = 0;
            for linear in experts.experts.iter_mut().flat_map(|e| [&mut e.up, &mut e.down]).chain([&mut experts.router])
            {
                len = linear.attach(len, &mut |_| Some(LORA));
            }
            let (parameters, x, dy) = (random(len, 1), random(T * C, 2), random(T * C, 3));
            let mut inputs: Vec<(&[f32], usize, usize)> = vec![(&x, T, C)];
            let mut ranges = Vec::new();
            for linear in experts.experts.iter().flat_map(|e| [&e.up, &e.down]).chain([&experts.router]) {
                for part in &linear.parts {
                    let lora = part.lora.as_ref().unwrap();
                    inputs.push((&parameters[lora.a.clone()], LORA.r, linear.inputs()));
                    inputs.push((&parameters[lora.b.clone()], part.rows.len(), LORA.r));
                    ranges.extend([lora.a.clone(), lora.b.clone()]);
                }
            }
            let oracle = Oracle::run(&inputs, |i| reference(&experts, i), &dy);
            let rope = [Tables::new(1.0, 0, &Scaling::None, 0), Tables::new(1.0, 0, &Scaling::None, 0)];
            let (positions, spans) = (Vec::new().into(), Spans::default());
            let parameters = Matrix::from_slice(1, len, &parameters);
            let (parameters, positions, spans, rope) = (&parameters, &positions, &spans, &rope);
            let pass =
                Pass { parameters, exact: parameters, positions, spans, seed: None, rope, past: None, later: None };
            let x = Matrix::from_slice(T, C, &x);
            let mut y = Matrix::from_slice(T, C, &[1.0; T * C]);
            let saved = experts.forward(&pass, &x, &mut y, true);
            assert_close(&y, &oracle.y.iter().map(|v| v + 1.0).collect::<Vec<_>>(), 1e-5);
            let mut grads = Matrix::zeros(1, len);
            let mut to = Gradients { parameters, grads: &mut grads, past: None };
            let mut dx = Matrix::new(T, C);
            let dy = Matrix::from_slice(T, C, &dy);
            experts.backward(&pass, &mut to, &dy, || x.clone(), saved, Some((&mut dx, false)));
            assert_close(&dx, &oracle.grads[0], 1e-5);
            for (range, want) in ranges.into_iter().zip(&oracle.grads[1..]) {
                assert_close(&grads[range], want, 1e-5);
            }
        }
    }
}
