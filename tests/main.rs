//! The one integration test binary: a list of modules.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr, clippy::type_complexity)]

mod chat;
mod checkpoints;
mod cli;
mod command_lines;
mod corpus;
#[cfg(all(feature = "cuda", unix))]
mod cuda;
mod datasets;
mod device;
mod download;
mod emulated;
mod faults;
mod finetune;
mod folders;
mod gguf;
mod golden;
mod golden_litgpt;
mod kernels;
mod layering;
mod pains;
mod quantized;
mod recipes;
mod report;
mod resume;
mod templates;
mod text;
mod util;
mod validate;
mod zip;
