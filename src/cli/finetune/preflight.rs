//! What a run needs of memory, before weights are loaded, and how it is computed in what there is.

use crate::checkpoint::Checkpoint;
use crate::cli::load::Compute;
use crate::cli::ui::Ui;
use crate::data::prefix;
use crate::data::sft::Sample;
use crate::error::{Error, Result};
use crate::model::Config;
use crate::model::quantizer::Quantizer;
use crate::train::estimate::{Computed, Estimate, ways_out};
use crate::train::longest_tokens;
use crate::train::settings::{FinetuneSettings, Switch};

/// How the samples are computed in the memory that there is. Turns prefix sharing off in the settings where it is not done.
pub(super) fn computed(
    settings: &mut FinetuneSettings,
    checkpoint: &Checkpoint,
    compute: &Compute,
    quantizer: Option<Quantizer>,
    [train, val]: [&[Sample]; 2],
    packs: &[Vec<usize>],
    ui: &mut Ui,
) -> anyhow::Result<Computed> {
    let longest = train.iter().chain(val).map(|sample| sample.input_ids.len()).max().unwrap_or(0);
    if longest > checkpoint.config.rope_scaling.alike() {
        // Of a short and a long sample not even the first keys are the same.
        if settings.train.prefix_sharing == Switch::On {
            ui.note("prefixes are not shared: samples on both sides of the model's longrope begin otherwise");
        }
        settings.train.prefix_sharing = Switch::Off;
    }
    let wanted = Computed {
        store: compute.store(),
        narrow: checkpoint.narrow(compute.store(), compute.device.is_some())?,
        quantizer,
        whole: checkpoint.left_whole(),
        on_device: compute.device.is_some(),
        tokens: longest_tokens(train, packs, settings.train.micro_batch_size),
        checkpointing: settings.train.activation_checkpointing == Switch::On,
        prefix: if settings.train.prefix_sharing == Switch::Off { 0 } else { prefix::longest(train) },
    };
    let prefix = wanted.prefix;
    let computed = preflight(&checkpoint.config, settings, compute, wanted, ui)?;
    if computed.prefix < prefix {
        // Rounding and dropout hang on it: a run that resumes has to do the same.
        settings.train.prefix_sharing = Switch::Off;
    }
    Ok(computed)
}

/// Share of the free memory that an estimate is not to fill.
const RESERVE: f64 = 0.04;

/// Says what the run needs and what there is; how it is computed: as `wanted`, or so that it needs less memory where the
/// settings leave the choice.
///
/// # Errors
/// When it does not fit into the memory of a GPU, with what would. The processor's memory can be swapped and freed by
/// others: there it is a warning.
fn preflight(
    config: &Config,
    settings: &FinetuneSettings,
    compute: &Compute,
    wanted: Computed,
    ui: &mut Ui,
) -> Result<Computed> {
    let free = compute.free_memory().unwrap_or(usize::MAX);
    // What the driver and the allocator keep for themselves is not ours to count.
    let fits = |estimate: &Estimate| estimate.total() as f64 <= (1.0 - RESERVE) * free as f64;
    let switches = [settings.train.activation_checkpointing, settings.train.prefix_sharing].map(|s| s == Switch::Auto);
    let choices = [(false, false), (false, true), (true, false), (true, true)].into_iter();
    // On the processor, whose memory others come and go in, the run itself must not depend on what is free.
    let [again_allowed, alone_allowed] = [switches[0], switches[1] && wanted.on_device];
    let choices = choices.filter(|(again, alone)| (!again || again_allowed) && (!alone || alone_allowed));
    let choices = choices.map(|(again, alone)| Computed {
        checkpointing: wanted.checkpointing || again,
        prefix: if alone { 0 } else { wanted.prefix },
        ..wanted
    });
    let mut estimates =
        choices.map(|computed| (computed, Estimate::of(config, settings, computed))).collect::<Vec<_>>();
    let last = estimates.len() - 1;
    let chosen = estimates.iter().position(|(_, estimate)| fits(estimate)).unwrap_or(last);
    let (computed, estimate) = estimates.swap_remove(chosen);
    if fits(&estimate) && computed.checkpointing && !wanted.checkpointing {
        ui.note("activations are computed twice to save memory; --train.activation_checkpointing off forbids it");
    }
    if fits(&estimate) && computed.prefix < wanted.prefix {
        ui.note("what samples begin with is computed for each to save memory; --train.prefix_sharing on forbids it");
    }
    let gb = |bytes: usize| format!("{:.2}", bytes as f64 / 1e9);
    let parts: Vec<String> =
        estimate.components().iter().map(|(name, bytes)| format!("{name} {}", gb(*bytes))).collect();
    let found = if free == usize::MAX { String::new() } else { format!(" of {} GB free", gb(free)) };
    ui.note(&format!("memory: about {} GB{found} ({})", gb(estimate.total()), parts.join(", ")));
    if fits(&estimate) {
        return Ok(computed);
    }
    let mut ways = ways_out(config, settings, computed).into_iter().filter(|(_, estimate)| fits(estimate));
    let way = ways.next().map(|(name, estimate)| format!("{name} would need {} GB", gb(estimate.total())));
    let message = format!(
        "this run needs about {} GB and a reserve of {:.0} %, and {} GB are free on {}",
        gb(estimate.total()),
        100.0 * RESERVE,
        gb(free),
        compute.place()
    );
    let hint = way.unwrap_or_else(|| "use a smaller model".to_owned());
    if computed.on_device {
        return Err(Error::refused(message, hint));
    }
    ui.note(&format!("{message}; {hint}"));
    Ok(computed)
}
