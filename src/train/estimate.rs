//! What a run needs of memory, before anything of it is loaded: by component, from the architecture, the settings and the
//! longest micro batch.
//!
//! What is counted is what this program keeps, block by block (`model::block::Saved` and its parts); temporaries are those
//! of the widest moment of a block's backward. So it is an estimate from above by a few percent, no upper bound.

use super::settings::FinetuneSettings;
use crate::model::config::{Config, Mlp};
use crate::model::quantizer::Quantizer;
use crate::ops::weight::Store;

/// How a run is computed.
#[derive(Debug, Clone, Copy)]
pub struct Computed {
    /// What unquantized weights are.
    pub store: Store,
    /// Whether those of f32 are kept in the 16 bits that they have in the files ([`Weight::widened`]).
    ///
    /// [`Weight::widened`]: crate::ops::weight::Weight::widened
    pub narrow: bool,
    /// How the blocks' matrices are quantized.
    pub quantizer: Option<Quantizer>,
    /// Elements of these that stay whole all the same.
    pub whole: usize,
    /// Whether on a device, where activations have the type of the weights; on the host they are f32, but for the widest
    /// of a bf16 model (`model::mlp`).
    pub on_device: bool,
    /// Tokens of the longest micro batch.
    pub tokens: usize,
    /// Whether blocks keep only their input.
    pub checkpointing: bool,
    /// Tokens of the longest prefix that is computed once for several samples.
    pub prefix: usize,
}

/// Bytes that a run needs, by what they are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Estimate {
    /// Frozen weights.
    pub weights: usize,
    /// Adapters, their gradients and both moments.
    pub adapters: usize,
    /// What the blocks keep for their backward, and the temporaries of one.
    pub activations: usize,
    /// Logits of a chunk of rows and what surrounds them.
    pub head: usize,
    /// Scratch for decoding weights and for the products' library; on the host also the program, tokenizer and data.
    pub workspace: usize,
}

/// Parameters of all adapters.
fn adapter_parameters(config: &Config, settings: &FinetuneSettings) -> usize {
    let lora = &settings.lora;
    let mlp = lora.lora_mlp;
    let wanted = [lora.lora_query, lora.lora_key, lora.lora_value, lora.lora_projection, mlp, mlp, mlp];
    let block = config.projections().into_iter().zip(wanted).filter(|(_, wanted)| *wanted);
    let block: usize = block.map(|((inputs, outputs, count), _)| (inputs + outputs) * count * lora.lora_r).sum();
    let router = if mlp && config.routed() > 0 { (config.n_embd + config.routed()) * lora.lora_r } else { 0 };
    let head = if lora.lora_head { (config.n_embd + config.vocab_size) * lora.lora_r } else { 0 };
    config.n_layer * (block + router) + head
}

impl Estimate {
    /// The estimate for a run.
    #[must_use]
    pub fn of(config: &Config, settings: &FinetuneSettings, computed: Computed) -> Self {
        let weight_size = if computed.store == Store::F32 && !computed.narrow { 4 } else { 2 };
        let size = if computed.on_device { weight_size } else { 4 };
        let blocks = match computed.quantizer {
            Some(q) => q.bytes(config) + computed.whole * weight_size - q.most().bytes(1, computed.whole),
            None => config.projected() * weight_size,
        };
        // A router stays in 32 bit.
        let routers = config.n_layer * config.routed() * config.n_embd * 4;
        let tables = if config.tie_embeddings { 1 } else { 2 };
        let weights = blocks + routers + tables * config.vocab_size * config.n_embd * weight_size;
        let parameters = adapter_parameters(config, settings);
        // The parameters as the products read them, where these are of 16 bits.
        let copy = if computed.on_device && size == 2 { 2 } else { 0 };
        Self {
            weights,
            adapters: parameters * (4 * 4 + copy),
            // Recycled buffers on the host may be longer than what they hold by this much, more beside those of a prefix.
            activations: Self::activations(config, settings, computed, size)
                * match (computed.on_device, computed.prefix) {
                    (true, _) => 8,
                    (false, 0) => 9,
                    (false, _) => 10,
                }
                / 8,
            head: Self::head(config, computed, size),
            workspace: Self::workspace(computed, size),
        }
    }

    fn activations(config: &Config, settings: &FinetuneSettings, computed: Computed, size: usize) -> usize {
        let (c, q, kv) = (config.n_embd, config.q_cols(), config.kv_cols());
        let lora = &settings.lora;
        let ranks = lora.lora_r
            * [lora.lora_query, lora.lora_key, lora.lora_value, lora.lora_projection]
                .map(usize::from)
                .iter()
                .sum::<usize>()
            + if lora.lora_mlp { 3 * lora.lora_r } else { 0 };
        let visited = if let Mlp::Experts { n_expert_per_token, .. } = config.mlp { n_expert_per_token } else { 1 };
        let up = config.intermediate_size * visited * if config.mlp == Mlp::Plain { 1 } else { 2 };
        let streams = if config.parallel_residual { 1 } else { 2 };
        let normed = if config.qk_norm == crate::model::config::QkNorm::None { 0 } else { q + kv };
        // A bf16 model's activations wait in that type, but for the stream.
        let parked = if computed.store == Store::Bf16 { 2 } else { size };
        let kept = computed.tokens
            * ((streams * c + ranks + normed) * size + (q + 2 * kv + q + up) * parked + 4 * config.n_head);
        // Gradients of the stream, of the MLP's input and inside of it, beside its activations.
        let temporary = computed.tokens * (4 * c + up + 2 * config.intermediate_size * visited) * size;
        // Keys and values once more, and their gradients in f32.
        let prefix = config.n_layer * computed.prefix * 2 * kv * (size + 4);
        if computed.checkpointing {
            return config.n_layer * computed.tokens * c * size + kept + temporary + prefix;
        }
        config.n_layer * kept + temporary + prefix
    }

    fn head(config: &Config, computed: Computed, size: usize) -> usize {
        let rows = crate::model::head_rows(config, computed.on_device).min(computed.tokens);
        rows * (config.vocab_size + 4 * config.n_embd) * size + computed.tokens * config.n_embd * size
    }

    fn workspace(computed: Computed, size: usize) -> usize {
        match (computed.on_device, computed.quantizer) {
            (true, Some(_)) => (32 << 20) * (size + 1),
            (true, None) => 32 << 20,
            (false, _) => 112 << 20,
        }
    }

    /// Its components with their names.
    #[must_use]
    pub fn components(&self) -> [(&'static str, usize); 5] {
        [
            ("weights", self.weights),
            ("adapters and optimizer", self.adapters),
            ("activations", self.activations),
            ("head", self.head),
            ("workspace", self.workspace),
        ]
    }

    /// All of it, bytes.
    #[must_use]
    pub fn total(&self) -> usize {
        self.components().iter().map(|c| c.1).sum()
    }
}

/// Ways to need less, each with what it is called, for the run of `computed`; those that help little are left out.
#[must_use]
pub fn ways_out(config: &Config, settings: &FinetuneSettings, computed: Computed) -> Vec<(String, Estimate)> {
    let nf4 = Some(Quantizer::named("nf4").expect("a quantizer's name"));
    let micro = settings.train.micro_batch_size.max(1);
    let mut ways = Vec::new();
    let mut way = |name: &[String], computed: Computed| {
        ways.push((name.join(" "), Estimate::of(config, settings, computed)));
    };
    let checkpointed = Computed { checkpointing: true, ..computed };
    let on = "--train.activation_checkpointing on".to_owned();
    let quantize = "--quantize nf4".to_owned();
    let single = Computed { tokens: computed.tokens.div_ceil(micro), ..checkpointed };
    let one = "--train.micro_batch_size 1".to_owned();
    let short = |tokens: usize| format!("--train.max_seq_length {tokens}");
    if computed.prefix > 0 {
        way(&["--train.prefix_sharing off".to_owned()], Computed { prefix: 0, ..computed });
    }
    way(std::slice::from_ref(&on), checkpointed);
    if computed.quantizer.is_none() {
        way(std::slice::from_ref(&quantize), Computed { quantizer: nf4, ..computed });
        way(&[quantize.clone(), on.clone()], Computed { quantizer: nf4, ..checkpointed });
    }
    let quantizer = computed.quantizer.or(nf4);
    let mut smallest = if computed.quantizer.is_none() { vec![quantize, on] } else { vec![on] };
    if micro > 1 {
        smallest.push(one);
        way(&smallest, Computed { quantizer, ..single });
    }
    for tokens in [1024, 512, 256].into_iter().filter(|tokens| *tokens < single.tokens) {
        let name = [&smallest[..], &[short(tokens)]].concat();
        way(&name, Computed { quantizer, tokens, prefix: single.prefix.min(tokens - 1), ..single });
    }
    ways
}

#[cfg(test)]
mod tests {
    use super::*;

    fn computed(tokens: usize) -> Computed {
        Computed {
            store: Store::Bf16,
            narrow: false,
            quantizer: None,
            whole: 0,
            on_device: true,
            tokens,
            checkpointing: false,
            prefix: 0,
        }
    }

    fn llama_7b() -> Config {
        Config::llama(32_000, 32, 4096, 32, 11_008)
    }

    /// The weights of Llama 2 7B are 13.5 GB, and 3.9 GB in NF4 with head and embedding in 16 bits.
    #[test]
    fn llama_2_7b_is_as_large_as_it_is_known_to_be() {
        let settings = FinetuneSettings::default();
        let plain = Estimate::of(&llama_7b(), &settings, computed(1024));
        assert!((plain.weights as f64 / 13.476e9 - 1.0).abs() < 1e-3, "{}", plain.weights);
        let nf4 = Quantizer::named("nf4");
        let quantized = Estimate::of(&llama_7b(), &settings, Computed { quantizer: nf4, ..computed(1024) });
        assert!((quantized.weights as f64 / 4.17e9 - 1.0).abs() < 0.02, "{}", quantized.weights);
        // r 8 on q and v: 4.2 million parameters.
        assert_eq!(plain.adapters, 4_194_304 * 18);
        assert!(quantized.total() < 8_000_000_000, "{}", quantized.total());
    }

    /// Measured peaks of SmolLM2-135M on the host, one sample of 256 and 512 tokens: GB in f32 and in bf16.
    #[test]
    fn smollm2_is_as_large_as_was_measured() {
        let mut config = Config::llama(49_152, 30, 576, 9, 1536);
        (config.n_query_groups, config.tie_embeddings) = (3, true);
        for (store, narrow, tokens, measured) in [
            (Store::F32, false, 256, 0.93),
            (Store::F32, false, 512, 1.15),
            (Store::F32, true, 256, 0.65),
            (Store::Bf16, false, 256, 0.55),
            (Store::Bf16, false, 512, 0.68),
        ] {
            let computed = Computed { store, narrow, on_device: false, ..computed(tokens) };
            let estimate = Estimate::of(&config, &FinetuneSettings::default(), computed).total() as f64 / 1e9;
            assert!((estimate / measured - 1.0).abs() < 0.1, "{store:?} {tokens}: {estimate} for {measured}");
        }
    }

    #[test]
    fn checkpointing_and_shorter_samples_need_less() {
        let settings = FinetuneSettings::default();
        let of = |computed| Estimate::of(&llama_7b(), &settings, computed).total();
        let whole = of(computed(2048));
        assert!(of(Computed { checkpointing: true, ..computed(2048) }) < whole);
        assert!(of(computed(1024)) < whole);
        // Keys, values and the gradients of both, 32 layers of 4096 each.
        let shared = of(Computed { prefix: 100, ..computed(2048) });
        assert_eq!(shared - whole, 100 * 32 * 2 * 4096 * (2 + 4));
        let ways = ways_out(&llama_7b(), &settings, computed(2048));
        assert!(ways.iter().all(|(_, estimate)| estimate.total() < whole), "{ways:?}");
        assert!(ways.last().is_some_and(|(name, _)| name.contains("--train.max_seq_length 256")));
    }
}
