//! A device that does nothing but count, for benches of what stands before one.

use litgpt::ops::device::{Backend, Launch, Product, Refusal};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// How often each thing was asked for, while counting.
#[derive(Default)]
pub struct Asked {
    pub by_name: Mutex<BTreeMap<String, usize>>,
    pub counting: AtomicBool,
}

impl Asked {
    fn one(&self, name: &str) -> Result<(), Refusal> {
        if self.counting.load(Ordering::Relaxed) {
            *self.by_name.lock().unwrap().entry(name.to_owned()).or_default() += 1;
        }
        Ok(())
    }
}

/// It gives out addresses of no memory.
pub struct Idle {
    asked: Arc<Asked>,
    next: AtomicU64,
}

impl Idle {
    pub fn new(asked: Arc<Asked>) -> Self {
        Self { asked, next: AtomicU64::new(256) }
    }
}

impl Backend for Idle {
    fn name(&self) -> &str {
        "a device that does nothing"
    }

    fn allocate(&self, bytes: usize) -> Result<u64, Refusal> {
        self.asked.one("(allocation)")?;
        Ok(self.next.fetch_add(bytes.next_multiple_of(256) as u64, Ordering::Relaxed))
    }

    fn free(&self, _: u64) {}

    fn upload(&self, _: &[u8], _: u64) -> Result<(), Refusal> {
        self.asked.one("(copy to the device)")
    }

    fn download(&self, _: u64, _: &mut [u8]) -> Result<(), Refusal> {
        self.asked.one("(wait)")
    }

    fn copy(&self, _: u64, _: u64, _: usize) -> Result<(), Refusal> {
        self.asked.one("(copy)")
    }

    fn zero(&self, _: u64, _: usize) -> Result<(), Refusal> {
        self.asked.one("(zero)")
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<(), Refusal> {
        self.asked.one(launch.kernel)
    }

    fn product(&self, product: &Product) -> Result<(), Refusal> {
        self.asked.one(if product.m.min(product.n).min(product.k) <= 32 { "(small product)" } else { "(product)" })
    }

    fn memory(&self) -> Result<(usize, usize), String> {
        Ok((80 << 30, 80 << 30))
    }

    fn processors(&self) -> usize {
        132
    }
}
