//! The tile registers: 0 to 3 are sums of two times 16 rows and two times 16 columns, 4 and 5 the rows, 6 and 7 the columns.

use super::TILES;
use crate::ops::simd::PANEL;
use crate::ops::simd::wide::LANES;
use std::arch::asm;

/// The registers, configured for this thread until this goes.
pub struct Tiles {
    rows: usize,
    columns: usize,
}

/// Lines of each tile and their bytes.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start: u8,
    reserved: [u8; 14],
    bytes: [u16; 16],
    lines: [u8; 16],
}

/// Tiles of both sides, of which the right one has all blocks of the contraction.
#[derive(Clone, Copy)]
pub struct Factors<'a> {
    pub left: &'a [f32],
    pub right: &'a [f32],
    pub parts: usize,
    pub ahead: Ahead,
}

/// Memory that is asked for with each block of the contraction, as it will be needed soon.
#[derive(Clone, Copy)]
pub struct Ahead {
    pub at: *const i8,
    /// Bytes from what is asked for with one block to that with the next.
    pub next: usize,
    /// Lines with each; at least one.
    pub lines: usize,
}

/// Where up to 32 x 32 sums go.
#[derive(Clone, Copy)]
pub struct Sums {
    pub y: *mut f32,
    pub ldy: usize,
    pub rows: usize,
    pub columns: usize,
    /// Whether they are added to what is there.
    pub accumulate: bool,
}

impl Tiles {
    /// Not configured yet.
    pub fn new() -> Self {
        Self { rows: 0, columns: 0 }
    }

    /// For so many rows and columns; the second 16 of either cannot be none.
    fn configure(&mut self, rows: usize, columns: usize) {
        if (self.rows, self.columns) == (rows, columns) {
            return;
        }
        (self.rows, self.columns) = (rows, columns);
        let (above, below) = (rows.min(LANES) as u8, rows.saturating_sub(LANES).max(1) as u8);
        let right = 4 * (columns - LANES) as u16;
        let mut configuration =
            Configuration { palette: 1, start: 0, reserved: [0; 14], bytes: [0; 16], lines: [0; 16] };
        configuration.bytes[..8].copy_from_slice(&[64, right, 64, right, 64, 64, 64, right]);
        configuration.lines[..8].copy_from_slice(&[above, above, below, below, above, below, 16, 16]);
        // SAFETY: only called where the instructions are; no other code uses these registers.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack, preserves_flags)) };
    }

    /// Sums of products of a left side's parts and a right side; `edge` is for those that do not fit in y.
    ///
    /// # Safety
    /// y has the rows and columns; the processor has the instructions.
    pub unsafe fn multiply(&mut self, factors: Factors<'_>, sums: Sums, edge: &mut [f32]) {
        let Sums { y, ldy, rows, columns, accumulate } = sums;
        let (edge, nowhere) = edge.split_at_mut(PANEL * PANEL);
        if columns > LANES {
            self.configure(rows, columns);
            // SAFETY: passed on.
            return unsafe { factors.multiply(sums, nowhere) };
        }
        self.configure(rows, PANEL);
        // SAFETY: passed on.
        unsafe {
            if accumulate {
                for (row, edge) in edge.chunks_exact_mut(PANEL).take(rows).enumerate() {
                    std::ptr::copy_nonoverlapping(y.add(row * ldy), edge.as_mut_ptr(), columns);
                }
            }
            factors.multiply(Sums { y: edge.as_mut_ptr(), ldy: PANEL, ..sums }, nowhere);
            for (row, edge) in edge.chunks_exact(PANEL).take(rows).enumerate() {
                std::ptr::copy_nonoverlapping(edge.as_ptr(), y.add(row * ldy), columns);
            }
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
    }
}

/// Asks memory for 8 lines of the left side's next tiles, from byte `at` on. Next to a busy other half of the core instructions of
/// tiles take 1.4 times as long in a row as with some others between them, whichever they are; elsewhere these cost nothing.
macro_rules! ask {
    ($at:literal) => {
        concat!(
            ".irp line, 0, 64, 128, 192, 256, 320, 384, 448\n",
            "prefetcht0 [{left} + 2048 + ",
            $at,
            " + \\line]\n",
            ".endr"
        )
    };
}

impl Factors<'_> {
    /// # Safety
    /// y has the rows and columns, for which the registers are configured.
    unsafe fn multiply(&self, sums: Sums, nowhere: &mut [f32]) {
        let Sums { y, ldy, rows, accumulate, .. } = sums;
        let depth = self.right.len() / TILES;
        assert!(depth > 0 && self.left.len() >= depth * self.parts * TILES, "product: tiles do not fit");
        // Where there is no 17th row, its tiles' only line goes nowhere.
        let below = if rows > LANES { y.wrapping_add(LANES * ldy) } else { nowhere.as_mut_ptr() };
        // SAFETY: passed on; the assert bounds what is read.
        unsafe {
            asm!(
                "test {count}, {count}",
                "jz 2f",
                "tileloadd tmm0, [{y} + {row}]",
                "tileloadd tmm1, [{y} + {row} + 64]",
                "tileloadd tmm2, [{below} + {row}]",
                "tileloadd tmm3, [{below} + {row} + 64]",
                "jmp 3f",
                "2:",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "3:",
                "tileloadd tmm6, [{right} + {line}]",
                "tileloadd tmm7, [{right} + {line} + 1024]",
                "mov {count}, {parts}",
                "4:",
                "tileloadd tmm4, [{left} + {line}]",
                ask!(0),
                "tdpbf16ps tmm0, tmm4, tmm6",
                ask!(512),
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{left} + {line} + 1024]",
                ask!(1024),
                "tdpbf16ps tmm2, tmm5, tmm6",
                ask!(1536),
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {left}, 2048",
                "dec {count}",
                "jnz 4b",
                "mov {at}, {ahead}",
                "mov {count}, {lines}",
                "5:",
                "prefetcht1 [{at}]",
                "add {at}, 64",
                "dec {count}",
                "jnz 5b",
                "add {ahead}, {next}",
                "add {right}, 2048",
                "dec {depth}",
                "jnz 3b",
                "tilestored [{y} + {row}], tmm0",
                "tilestored [{y} + {row} + 64], tmm1",
                "tilestored [{below} + {row}], tmm2",
                "tilestored [{below} + {row} + 64], tmm3",
                count = inout(reg) usize::from(accumulate) => _,
                y = in(reg) y,
                below = in(reg) below,
                row = in(reg) ldy * size_of::<f32>(),
                line = in(reg) 64_usize,
                left = inout(reg) self.left.as_ptr() => _,
                right = inout(reg) self.right.as_ptr() => _,
                depth = inout(reg) depth => _,
                parts = in(reg) self.parts,
                at = out(reg) _,
                ahead = inout(reg) self.ahead.at => _,
                next = in(reg) self.ahead.next,
                lines = in(reg) self.ahead.lines,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}
