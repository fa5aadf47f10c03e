//! LoRA and QLoRA finetuning of language models from one binary.
//!
//! The rooms, and who may call whom:
//!
//! ```text
//! main -> cli -> train -> checkpoint -> model -> ops
//!          |      |----> data -> tokenizer
//!          '----> generate -> model, tokenizer
//! ```
//!
//! `ops` knows matrices only; `model` does no I/O; `data` knows no model; `train` prints nothing and tells a `Report`;
//! only `cli` joins rooms and only `cli::ui` writes to the terminal. `error` may be used by all but `ops`.

pub mod checkpoint;
pub mod cli;
pub mod data;
pub mod error;
pub mod generate;
pub mod model;
pub mod ops;
pub mod tokenizer;
pub mod train;
