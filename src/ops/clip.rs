//! Clamping to `[-limit, limit]`, in place; the gradient is zero where a value was beyond.

use super::device::{Buffer, long};
use super::matrix::Matrix;

/// Which elements were beyond the limit.
#[derive(Debug)]
pub enum Saved {
    /// On the host.
    Host(Vec<bool>),
    /// On a device, a byte each.
    Device(Buffer),
}

/// Clamps every element.
pub fn forward(x: &mut Matrix, limit: f32) -> Saved {
    if let Some((device, dtype)) = x.place() {
        let n = x.rows() * x.cols();
        let beyond = device.allocate(n);
        let args = [x.pointer().into(), (&beyond).into(), long(n), limit.into()];
        device.launch_over("clip_fwd", Some(dtype), n, &args);
        return Saved::Device(beyond);
    }
    let clamp = |v: &mut f32| {
        let beyond = v.abs() > limit;
        *v = v.clamp(-limit, limit);
        beyond
    };
    Saved::Host(x.iter_mut().map(clamp).collect())
}

/// Zeroes the gradient of the clamped elements.
pub fn backward(d: &mut Matrix, saved: &Saved) {
    match saved {
        Saved::Host(beyond) => d.iter_mut().zip(beyond).filter(|(_, beyond)| **beyond).for_each(|(d, _)| *d = 0.0),
        Saved::Device(beyond) => {
            let (n, dtype) = (d.rows() * d.cols(), d.place().map(|place| place.1));
            beyond.device().launch_over("clip_bwd", dtype, n, &[d.pointer().into(), beyond.into(), long(n)]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Oracle, assert_close, random};

    #[test]
    fn clipping_equals_the_reference() {
        let (x, dy) = (random(5 * 123, 1), random(5 * 123, 2));
        let oracle = Oracle::run(&[(&x, 5, 123)], |i| i[0].minimum(0.4f64)?.maximum(-0.4f64), &dy);
        let mut matrix = Matrix::from_slice(5, 123, &x);
        let saved = forward(&mut matrix, 0.4);
        assert_close(&matrix, &oracle.y, 0.0);
        let mut d = Matrix::from_slice(5, 123, &dy);
        backward(&mut d, &saved);
        assert_close(&d, &oracle.grads[0], 0.0);
    }
}
