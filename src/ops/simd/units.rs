//! A gated MLP's first product and its units in one: gate and up of some columns are at hand together, so that the units need
//! not read them from memory.

use super::forward::{GROUP, forward_in_halves};
use super::{Level, PANEL, Panels, Shared};
use crate::ops::matrix::{Matrix, ParkedMut, View, round};
use half::bf16;

/// Whether this processor's products can be made so.
#[must_use]
pub fn makes_units(level: Level, w: Panels<'_>) -> bool {
    level.parts().is_none() || !matches!(w, Panels::Bf16(_))
}

/// `h = units(x Wᵀ)` for a `w` of gate's rows and, below them, up's. `units` makes some units of rows of as many gates and then
/// ups. Gates and ups are kept, too.
///
/// # Shapes
/// `x`: (T, cols); `w`: (2 I, cols); `h`: (T, I); `kept`: (T, 2 I).
///
/// # Panics
/// When the shapes do not fit together, or not [`makes_units`].
pub fn forward_units(
    level: Level,
    x: View<'_>,
    w: Panels<'_>,
    shape: (usize, usize),
    h: &mut Matrix,
    kept: ParkedMut<'_>,
    units: impl Fn(usize, &[f32], &mut [f32]) + Sync,
) {
    let (tokens, width) = (x.rows, shape.0 / 2);
    assert!(h.rows() == tokens && h.cols() == width, "units: shapes do not fit");
    let h_to = Shared(h.as_mut_ptr());
    let (whole, rounded) = match kept {
        ParkedMut::Whole(matrix) => {
            assert!(matrix.len() == 2 * width * tokens, "units: shapes do not fit");
            (Some(Shared(matrix.as_mut_ptr())), None)
        }
        ParkedMut::Rounded(halves) => {
            assert!(halves.len() == 2 * width * tokens, "units: shapes do not fit");
            (None, Some(Shared(halves.as_mut_ptr())))
        }
    };
    forward_in_halves(level, x, w, shape, &|tokens, columns, gate_up| {
        let len = columns.len();
        let mut made = [0.0; PANEL * GROUP];
        let made = &mut made[..tokens.len() * len];
        units(len, gate_up, made);
        // SAFETY: the tokens and columns lie inside the matrices, and each is given once.
        unsafe { scatter(made, len, h_to.at(tokens.start * width + columns.start), width) };
        let at = tokens.start * 2 * width + columns.start;
        if let Some(whole) = whole {
            // SAFETY: as above; ups are as far behind their gates as there are units.
            unsafe { scatter(gate_up, len, whole.at(at), width) };
        }
        if let Some(rounded) = rounded {
            let mut halves = [bf16::ZERO; 2 * PANEL * GROUP];
            let halves = &mut halves[..gate_up.len()];
            round(halves, gate_up);
            // SAFETY: as above.
            unsafe { scatter(halves, len, rounded.at(at), width) };
        }
    });
}

/// Copies pieces of `len` elements that follow one another to places `stride` apart.
///
/// # Safety
/// They can be written.
unsafe fn scatter<T: Copy>(from: &[T], len: usize, to: *mut T, stride: usize) {
    for (i, piece) in from.chunks_exact(len).enumerate() {
        // SAFETY: passed on.
        unsafe { std::ptr::copy_nonoverlapping(piece.as_ptr(), to.add(i * stride), len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::glu::{Activation, Units};
    use crate::ops::matrix::Parked;
    use crate::ops::testing::{assert_close, random};
    use crate::ops::weight::{Data, Weight};

    /// Odd numbers of tokens, units and columns, more units than go together, more columns than one chunk has.
    #[test]
    fn units_made_at_once_are_those_made_after_the_product() {
        for (t, units, cols) in [(9, 5, 7), (37, 53, 70), (40, 200, 33), (300, 20, 1031), (33, 17, 2300)] {
            let narrow: Vec<bf16> = random(2 * units * cols, 1).iter().map(|v| bf16::from_f32(v * 0.2)).collect();
            let wide: Vec<f32> = narrow.iter().map(|v| v.to_f32()).collect();
            let x = Matrix::from_slice(t, cols, &random(t * cols, 2));
            let kind = Units { activation: Activation::Silu, gated: true };
            for weight in [
                Weight::new(2 * units, cols, Data::F32(wide)),
                Weight::widened(2 * units, cols, narrow.clone()),
                Weight::new(2 * units, cols, Data::Bf16(narrow)),
            ] {
                let mut gate_up = Matrix::new(t, 2 * units);
                weight.forward(x.view(), &mut gate_up, false);
                let expected = super::super::level().is_some_and(|level| level.parts().is_none());
                for rounded in [false, true] {
                    let made = weight.forward_units(&x, kind, rounded);
                    assert!(made.is_some() || !expected);
                    let Some((h, kept)) = made else { continue };
                    assert_close(&h, &kind.forward(&gate_up), 1e-6);
                    let ((), want) = Parked::beside(gate_up.clone(), rounded, |_| ());
                    assert_close(&kept.get(), &want.get(), if rounded { 4e-3 } else { 1e-6 });
                }
            }
        }
    }
}
