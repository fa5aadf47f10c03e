//! SIGINT, SIGTERM and SIGHUP ask a run to stop; the second one of a kind ends the process at once. SIGXFSZ is caught in all
//! commands, so that a write beyond the limit of file sizes fails as one to a full disk does. Under `nohup`, SIGHUP stays ignored.

use crate::error::{Error, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// The last signal that asked for a stop; 0: none.
#[derive(Debug)]
pub struct Signals(Arc<AtomicUsize>);

/// A run that a signal ended after it was saved. It has been reported already; the code is 128 + the signal.
#[derive(Debug, thiserror::Error)]
#[error("stopped by signal {0}")]
pub struct Stopped(pub u8);

impl Signals {
    /// Begins to listen.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn listen() -> Result<Self> {
        let last = Arc::new(AtomicUsize::new(0));
        let refused = |e: std::io::Error| Error::refused(format!("cannot listen to signals: {e}"), "");
        let mut all = vec![SIGINT, SIGTERM];
        #[cfg(unix)]
        if !is_ignored(signal_hook::consts::SIGHUP) {
            all.push(signal_hook::consts::SIGHUP);
        }
        for signal in all {
            let asked = Arc::new(AtomicBool::new(false));
            // In this order: the first signal finds `asked` unset.
            flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&asked))
                .and_then(|_| flag::register(signal, asked))
                .and_then(|_| flag::register_usize(signal, Arc::clone(&last), signal as usize))
                .map_err(refused)?;
        }
        Ok(Self(last))
    }

    /// The signal that asked for a stop.
    pub fn asked(&self) -> Option<Stopped> {
        let signal = self.0.load(Ordering::Relaxed);
        (signal != 0).then_some(Stopped(signal as u8))
    }
}

/// Has writes beyond the limit of file sizes fail, where they would end the process.
pub fn outlive_full_files() {
    // Where the system refuses, such a write still ends the process.
    #[cfg(unix)]
    let _ = flag::register(signal_hook::consts::SIGXFSZ, Arc::default());
}

/// Whether this process was started with `signal` ignored, where the system tells.
#[cfg(unix)]
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}
