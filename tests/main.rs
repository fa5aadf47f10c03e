//! The one integration test binary: a list of modules.

mod command_lines;
mod download;
mod golden;
mod text;
