//! `litgpt generate`: continues a prompt.

use super::args::GenerateArgs;
use super::load::{Compute, model};
use super::ui::Ui;
use crate::data::chat::Message;
use crate::error::Error;
use crate::generate::{Draw, Request, Session, room, text};

/// Runs the command.
pub fn run(args: &GenerateArgs, ui: &mut Ui) -> anyhow::Result<()> {
    args.load.notes().iter().for_each(|line| ui.note(line));
    for (flag, value) in [("num_samples", args.num_samples), ("max_new_tokens", args.sampling.max_new_tokens)] {
        if value == 0 {
            return Err(Error::usage(format!("--{flag} is 0, so there is nothing to do"), "give 1 or more").into());
        }
    }
    let dir = args.model.path()?;
    let (quantize, style) = (args.load.quantize.as_deref(), args.load.prompt_style.as_deref());
    let compute = Compute::find(args.load.accelerator, args.load.precision)?;
    let mut loaded = model(&dir, &compute, quantize, style, ui)?;
    let system = args.sys_prompt.as_deref().filter(|text| !text.is_empty()).map(|text| Message::new("system", text));
    let messages: Vec<_> = system.into_iter().chain([Message::new("user", &args.prompt)]).collect();
    let prompt = loaded.style.prompt_ids(&loaded.tokenizer, &messages)?;
    let room = room(prompt.len(), args.sampling.max_new_tokens, loaded.gpt.config.block_size)?;
    loaded.gpt.prepare(prompt.len() + room);
    let stop_ids = loaded.style.stop_ids(&loaded.tokenizer);
    for sample in 0..args.num_samples {
        let request = Request {
            prompt: &prompt,
            max_new_tokens: room,
            draw: Draw {
                temperature: args.sampling.temperature,
                top_k: Some(args.sampling.top_k).filter(|k| *k > 0),
                top_p: args.sampling.top_p,
                seed: args.sampling.seed.wrapping_add(sample as u64),
            },
            stop_ids: &stop_ids,
            stop_texts: loaded.style.stop_texts(),
            prompt_lookup: args.sampling.prompt_lookup_num_tokens,
        };
        let mut whole = String::new();
        let figures = text(&loaded.gpt, &loaded.tokenizer, &mut Session::alone(&loaded.gpt), &request, |piece| {
            if args.stream {
                return ui.result(piece);
            }
            whole.push_str(piece);
            Ok(())
        })?;
        ui.result(&format!("{whole}\n"))?;
        let rate = figures.tokens.saturating_sub(1) as f64 / figures.decode.as_secs_f64().max(1e-9);
        let guessed = if figures.guessed > 0 { format!(", {} guessed right", figures.guessed) } else { String::new() };
        ui.note(&format!(
            "{} tokens{guessed}, first after {:.2} s, then {rate:.1} tokens/s",
            figures.tokens,
            figures.prefill.as_secs_f64()
        ));
    }
    if let Some(peak) = compute.peak_memory() {
        ui.note(&peak);
    }
    Ok(())
}
