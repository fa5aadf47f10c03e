//! Memory of a device: buffers that are written and read, and numbers that never change.

use super::Device;
use std::ops::Deref;
use std::sync::OnceLock;

/// Memory of a device, given back when dropped.
#[derive(Debug)]
pub struct Buffer {
    pub(super) device: Device,
    pub(super) pointer: u64,
    pub(super) bytes: usize,
}

impl Buffer {
    /// Its device.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Address of its first byte; 0 after a failure.
    #[must_use]
    pub fn pointer(&self) -> u64 {
        self.pointer
    }

    /// Its size in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Writes zeros.
    pub fn zero(&self) {
        if self.bytes > 0 {
            self.device.work("a memset", |backend| backend.zero(self.pointer, self.bytes));
        }
    }

    /// Overwrites its beginning.
    ///
    /// # Panics
    /// When there are more bytes than it has.
    pub fn write(&self, bytes: &[u8]) {
        assert!(bytes.len() <= self.bytes, "a write beyond the end of a buffer");
        self.device.work("a copy to the device", |backend| backend.upload(bytes, self.pointer));
    }

    /// Copies its beginning, `to.len()` bytes; zeros after a failure.
    pub fn read(&self, to: &mut [u8]) {
        to.fill(0);
        if !to.is_empty() {
            self.device.work("a copy from the device", |backend| backend.download(self.pointer, to));
        }
    }

    /// Copies `bytes` from the beginning of `from`.
    ///
    /// # Panics
    /// When one of them is shorter.
    pub fn copy_from(&self, from: &Self, bytes: usize) {
        assert!(bytes <= self.bytes && bytes <= from.bytes, "a copy beyond the end of a buffer");
        if bytes > 0 {
            self.device.work("a copy on the device", |backend| backend.copy(from.pointer, self.pointer, bytes));
        }
    }
}

impl Clone for Buffer {
    fn clone(&self) -> Self {
        let copy = self.device.allocate(self.bytes);
        copy.copy_from(self, self.bytes);
        copy
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.pointer != 0 {
            self.device.0.backend.free(self.pointer);
        }
    }
}

/// A few numbers that never change, on the host and from their first use on also on the device.
#[derive(Debug, Default)]
pub struct Constant<T> {
    values: Vec<T>,
    there: OnceLock<Buffer>,
}

impl<T: bytemuck::NoUninit> Constant<T> {
    /// Address of the device's copy.
    ///
    /// # Panics
    /// When it was used on another device.
    pub fn on(&self, device: &Device) -> u64 {
        let buffer = self.there.get_or_init(|| device.upload(bytemuck::cast_slice(&self.values)));
        assert!(buffer.device == *device, "a constant of another device");
        buffer.pointer
    }
}

impl<T> From<Vec<T>> for Constant<T> {
    fn from(values: Vec<T>) -> Self {
        Self { values, there: OnceLock::new() }
    }
}

impl<T> FromIterator<T> for Constant<T> {
    fn from_iter<I: IntoIterator<Item = T>>(values: I) -> Self {
        values.into_iter().collect::<Vec<T>>().into()
    }
}

impl<T: Clone> Clone for Constant<T> {
    fn clone(&self) -> Self {
        self.values.clone().into()
    }
}

impl<T> Deref for Constant<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.values
    }
}
