//! The one integration test binary: a list of modules.

mod cli;
mod command_lines;
mod download;
mod finetune;
mod golden;
mod kernels;
mod layering;
mod text;
mod util;
