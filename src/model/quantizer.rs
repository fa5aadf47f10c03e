//! How the projections of a model's blocks are kept in few bits: all in one format, or those that lose most to 4 bits in 8.

use super::config::{Config, Mlp};
use crate::ops::nf4::Kind4;
use crate::ops::quantized::Format;
use std::collections::HashSet;

/// The most that `nf4-mixed` takes of what the same weights take in 16 bits.
const MIXED_SHARE: f64 = 0.30;
/// One block in so many is an outer one.
const OUTER: usize = 6;

/// A way to keep a model's projections in few bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantizer {
    /// All in one format.
    All(Format),
    /// In `nf4-dq`, but for as many in 8 bits as fit into 0.30 of what the same weights take in 16 bits.
    Mixed,
}

impl Quantizer {
    /// What most of the matrices of `Mixed` are kept in.
    const MOST: Format = Format::Four { kind: Kind4::Nf4, double: true };

    /// The quantizer of a name on the command line.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        if name == Self::Mixed.name() { Some(Self::Mixed) } else { Format::named(name).map(Self::All) }
    }

    /// Its name on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::All(format) => format.name(),
            Self::Mixed => "nf4-mixed",
        }
    }

    /// What most of the matrices are in.
    #[must_use]
    pub const fn most(self) -> Format {
        match self {
            Self::All(format) => format,
            Self::Mixed => Self::MOST,
        }
    }

    /// The format of each module. `alone`: whether one, as `model.layers.0.self_attn.v_proj`, can have a format of its own.
    #[must_use]
    pub fn formats(self, config: &Config, alone: impl Fn(&str) -> bool) -> Formats {
        let eights = self.eights(config, alone).into_iter().map(|eight| eight.name).collect();
        Formats { most: self.most(), eights }
    }

    /// Bytes of all projections of the blocks.
    #[must_use]
    pub fn bytes(self, config: &Config) -> usize {
        all_in(self.most(), config) + self.eights(config, |_| true).iter().map(Projection::more).sum::<usize>()
    }

    fn eights(self, config: &Config, alone: impl Fn(&str) -> bool) -> Vec<Projection> {
        if self == Self::Mixed { eights(config, alone) } else { Vec::new() }
    }
}

/// The formats of a model's modules.
#[derive(Debug)]
pub struct Formats {
    most: Format,
    /// The modules in 8 bits where most are in 4.
    eights: HashSet<String>,
}

impl Formats {
    /// The format of a module, as `model.layers.0.self_attn.v_proj`.
    #[must_use]
    pub fn of(&self, module: &str) -> Format {
        if self.eights.contains(module) { Format::Int8 } else { self.most }
    }
}

fn all_in(format: Format, config: &Config) -> usize {
    let block = config.projections().into_iter();
    config.n_layer * block.map(|(inputs, outputs, count)| count * format.bytes(outputs, inputs)).sum::<usize>()
}

/// A module of a model that may be kept in 8 bits.
struct Projection {
    name: String,
    outputs: usize,
    inputs: usize,
}

impl Projection {
    /// Bytes that 8 bits take more than [`Quantizer::MOST`].
    fn more(&self) -> usize {
        Format::Int8.bytes(self.outputs, self.inputs) - Quantizer::MOST.bytes(self.outputs, self.inputs)
    }
}

/// The modules of `nf4-mixed` that are kept in 8 bits: as many as there is room for of the values, of the outer blocks' MLPs,
/// of the keys and of the other MLPs from the outside in, of those that stand `alone`.
///
/// A fixed order, so that weights can be quantized as they are loaded. It is that in which SmolLM2-135M's matrices lose to 4
/// bits for each byte (`benches/README.md`), and agrees with what llama.cpp gives more bits to in its `Q4_K_M` (values, and
/// the way down in the outer blocks).
fn eights(config: &Config, alone: impl Fn(&str) -> bool) -> Vec<Projection> {
    let (n_layer, n_embd) = (config.n_layer, config.n_embd);
    let attention = |name: &'static str| {
        (0..n_layer).map(move |layer| Projection {
            name: format!("model.layers.{layer}.self_attn.{name}"),
            outputs: config.kv_cols(),
            inputs: n_embd,
        })
    };
    // The last, the first, the last but one and so on.
    let outside_in = |at: usize| if at.is_multiple_of(2) { n_layer - 1 - at / 2 } else { at / 2 };
    let mlp = |at: usize| {
        let prefix = format!("model.layers.{}.mlp", outside_in(at));
        let units = config.intermediate_size;
        let down = Projection { name: format!("{prefix}.down_proj"), outputs: n_embd, inputs: units };
        [down, Projection { name: format!("{prefix}.up_proj"), outputs: units, inputs: n_embd }]
    };
    // Each expert sees few tokens.
    let blocks = if matches!(config.mlp, Mlp::Experts { .. }) { 0 } else { n_layer };
    let outer = blocks.div_ceil(OUTER);
    let candidates = attention("v_proj")
        .chain((0..outer).flat_map(mlp))
        .chain(attention("k_proj"))
        .chain((outer..blocks).flat_map(mlp));
    let whole = all_in(Quantizer::MOST, config);
    let mut room = (MIXED_SHARE * 2.0 * config.projected() as f64) as usize;
    room = room.saturating_sub(whole);
    let fits = |candidate: &Projection| {
        let fits = candidate.more() <= room;
        room -= if fits { candidate.more() } else { 0 };
        fits
    };
    candidates.filter(|candidate| alone(&candidate.name)).filter(fits).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn smollm2() -> Config {
        let mut config = Config::llama(49_152, 30, 576, 9, 1536);
        config.n_query_groups = 3;
        config
    }

    #[test]
    fn mixed_fills_its_share_in_order() {
        let config = smollm2();
        let share = Quantizer::Mixed.bytes(&config) as f64 / (2.0 * config.projected() as f64);
        assert!((0.29..=0.30).contains(&share), "{share}");
        let formats = Quantizer::Mixed.formats(&config, |_| true);
        let eight = |module: &str| formats.of(&format!("model.layers.{module}")) == Format::Int8;
        for module in
            ["0.self_attn.v_proj", "17.self_attn.v_proj", "29.self_attn.k_proj", "29.mlp.down_proj", "1.mlp.up_proj"]
        {
            assert!(eight(module), "{module}");
        }
        for module in ["0.self_attn.q_proj", "29.mlp.gate_proj", "12.mlp.down_proj", "17.self_attn.o_proj"] {
            assert!(!eight(module), "{module}");
        }
    }

    #[test]
    fn no_model_takes_more_than_the_share() {
        let experts = Mlp::Experts { n_expert: 8, n_expert_per_token: 2, norm_topk: true };
        for (n_layer, groups, mlp) in [(32, 32, Mlp::Gated), (1, 4, Mlp::Plain), (2, 8, experts), (80, 1, Mlp::Gated)] {
            let mut config = Config::llama(1000, n_layer, 2048, 32, 5632);
            (config.n_query_groups, config.mlp) = (groups, mlp);
            let share = Quantizer::Mixed.bytes(&config) as f64 / (2.0 * config.projected() as f64);
            assert!(share <= MIXED_SHARE, "{share}");
            assert!(eights(&config, |_| true).iter().any(|eight| eight.name.ends_with("v_proj")));
            let without = eights(&config, |name| !name.ends_with("v_proj"));
            assert!(without.iter().all(|eight| !eight.name.ends_with("v_proj")));
        }
    }

    #[test]
    fn names_are_of_their_quantizers() {
        for name in ["nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "nf4-mixed"] {
            assert_eq!(Quantizer::named(name).map(Quantizer::name), Some(name));
        }
    }
}
