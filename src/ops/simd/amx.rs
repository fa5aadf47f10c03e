//! Both products with a bf16 weight by AMX: tiles of 16 rows of 64 bytes, whose product is 16 x 16 sums of 32 products each, at
//! about eight times the rate of `vdpbf16ps`.
//!
//! A tile of the left side holds 16 tokens, 32 elements each; one of the right side pairs of elements that follow each other in
//! the contraction, of 16 columns of the result. Those are made from the weight's panels for 32 columns at a time, by
//! transposing for `x Wᵀ` and by interleaving rows for `dy W`, and multiplied with all tokens.
//!
//! The left side is rounded to bf16, or, where the result has to be f32's, cut into three bf16 that add up to it. Their
//! products with bf16 are exact, so that only sums are rounded, as they are by FMA.

use super::tile::prefetch;
use super::wide::{LANES, Wide};
use super::{PANEL, Shared, Weight, checked, in_shares};
use crate::ops::matmul::ViewMut;
use crate::ops::matrix::{Matrix, View};
use half::bf16;
use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

/// Units of 32 bits in two tiles: those of 32 tokens and 32 elements, or of 32 elements and 32 columns.
const TILES: usize = 512;

/// Blocks of 32 elements of the contraction that are multiplied at a time, so that the right side stays in the first-level
/// cache.
const DEPTH: usize = 18;

/// How products read the weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contraction {
    /// `x Wᵀ`.
    Columns,
    /// `dy W`.
    Rows,
}

/// Whether this processor has the instructions, and the system lets the process use them.
#[cfg(target_os = "linux")]
pub fn is_available() -> bool {
    const TILE_DATA: u32 = 18;
    const REQUEST: i32 = 0x1023;
    let leaf = |leaf| (__cpuid(0).eax >= leaf).then(|| __cpuid_count(leaf, 0));
    let tiles = leaf(7).is_some_and(|leaf| leaf.edx >> 22 & 1 == 1 && leaf.edx >> 24 & 1 == 1);
    // SAFETY: asks for the tiles' state to be saved for this process; an error where there is none.
    tiles
        && is_x86_feature_detected!("avx512bf16")
        && unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILE_DATA) } == 0
}

#[cfg(not(target_os = "linux"))]
pub fn is_available() -> bool {
    false
}

/// The product of `x` and a bf16 weight, added to `y` where `accumulate`; `parts`: into how many bf16 an element of `x` is
/// cut, 1 or 3.
pub fn product(
    contraction: Contraction,
    parts: usize,
    x: View<'_>,
    (w, weight): (&[bf16], Weight<'_>),
    y: ViewMut<'_>,
    accumulate: bool,
) {
    let y_at = checked(&y);
    let left = Left::of(x, parts);
    let job = Job {
        contraction,
        w,
        rows: weight.rows,
        left: &left,
        tokens: x.rows,
        columns: y.cols,
        ldy: y.stride,
        accumulate,
    };
    let y = Shared(y.data.as_mut_ptr());
    in_shares(job.columns.div_ceil(PANEL), |strips| {
        // SAFETY: the level found the instructions; the caller compared the shapes; strips have columns of y of their own.
        unsafe { run(&job, y.at(y_at), strips) };
    });
}

/// The left side in tiles: of 32 tokens, block by block of 32 elements, two tiles of each part.
struct Left {
    units: Matrix,
    blocks: usize,
    parts: usize,
}

/// Index from which on units lie at the beginning of a cache line.
fn line(of: &[f32]) -> usize {
    of.as_ptr().align_offset(64).min(LANES)
}

impl Left {
    fn of(x: View<'_>, parts: usize) -> Self {
        let (strips, blocks) = (x.rows.div_ceil(PANEL), x.cols.div_ceil(PANEL));
        let mut units = Matrix::new(1, strips * blocks * parts * TILES + LANES);
        let from = line(&units);
        let to = Shared(units.as_mut_ptr());
        in_shares(strips * blocks, |share| {
            for at in share {
                let (strip, block) = (at / blocks, at % blocks);
                let to = to.at(from + at * parts * TILES);
                // SAFETY: the level found the instructions; every block has its tiles.
                unsafe { cut(x, (strip * PANEL, block * PANEL), parts, to) };
            }
        });
        Self { units, blocks, parts }
    }

    /// Address of a block of some tokens.
    fn at(&self, strip: usize, block: usize) -> *const f32 {
        self.units[line(&self.units) + (strip * self.blocks + block) * self.parts * TILES..].as_ptr()
    }
}

/// 32 elements of 32 tokens to tiles; what is missing is zero.
///
/// # Safety
/// `to` has the tiles of all parts; the processor has the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn cut(x: View<'_>, (token, col): (usize, usize), parts: usize, to: *mut f32) {
    for i in 0..PANEL {
        let values = if token + i < x.rows { &x.row(token + i)[col..(col + PANEL).min(x.cols)] } else { &[] };
        let (low, high) = values.split_at(values.len().min(LANES));
        // SAFETY: what is not there is not read.
        let mut left = [low, high].map(|x| unsafe { __m512::load_first(x.as_ptr(), x.len()) });
        for part in 0..parts {
            let now = if part + 1 == parts { left } else { [upper(left[0]), upper(left[1])] };
            let pairs = _mm512_cvtne2ps_pbh(now[1], now[0]);
            // SAFETY: a part has 32 lines; 32 bf16 are as long as 16 f32.
            unsafe { _mm512_store_ps(to.add(part * TILES + i * LANES), std::mem::transmute(pairs)) };
            left = [_mm512_sub_ps(left[0], now[0]), _mm512_sub_ps(left[1], now[1])];
        }
    }
}

/// The bits of f32 that bf16 has.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn upper(x: __m512) -> __m512 {
    _mm512_and_ps(x, _mm512_castsi512_ps(_mm512_set1_epi32(0xffff_0000_u32.cast_signed())))
}

struct Job<'a> {
    contraction: Contraction,
    /// In panels.
    w: &'a [bf16],
    rows: usize,
    left: &'a Left,
    tokens: usize,
    columns: usize,
    ldy: usize,
    accumulate: bool,
}

thread_local! {
    static TILES_OF_WEIGHT: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Some times 32 columns of y.
///
/// # Safety
/// See `product`.
unsafe fn run(job: &Job<'_>, y: *mut f32, strips: Range<usize>) {
    TILES_OF_WEIGHT.with_borrow_mut(|scratch| {
        scratch.resize((DEPTH + 3) * TILES + LANES, 0.0);
        let from = line(scratch);
        let (right, edge) = scratch[from..].split_at_mut(DEPTH * TILES);
        let mut tiles = Tiles::new();
        for strip in strips {
            for blocks in depths(job.left.blocks) {
                for (block, to) in blocks.clone().zip(right.chunks_exact_mut(TILES)) {
                    // SAFETY: passed on.
                    unsafe { job.make(strip, block, to.as_mut_ptr()) };
                }
                let accumulate = job.accumulate || blocks.start > 0;
                let columns = PANEL.min(job.columns - strip * PANEL);
                for token in 0..job.tokens.div_ceil(PANEL) {
                    let tokens = PANEL.min(job.tokens - token * PANEL);
                    let y = y.wrapping_add(token * PANEL * job.ldy + strip * PANEL);
                    let left = job.left.at(token, blocks.start);
                    let factors = Factors { left, right: right.as_ptr(), depth: blocks.len(), parts: job.left.parts };
                    tiles.configure(tokens);
                    let sums = Sums { y, ldy: job.ldy, accumulate, tokens };
                    // SAFETY: passed on.
                    unsafe {
                        if columns == PANEL {
                            factors.multiply(sums, edge);
                        } else {
                            factors.multiply_edge(sums, columns, edge);
                        }
                    }
                }
            }
        }
    });
}

/// Blocks in equal chunks.
fn depths(blocks: usize) -> impl Iterator<Item = Range<usize>> {
    let chunks = blocks.div_ceil(DEPTH);
    (0..chunks).map(move |i| i * blocks / chunks..(i + 1) * blocks / chunks)
}

impl Job<'_> {
    /// The tiles of 32 columns of y and a block of the contraction.
    ///
    /// # Safety
    /// They are inside the weight; `to` has two tiles; the processor has the instructions.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn make(&self, strip: usize, block: usize, to: *mut f32) {
        let (panel, rows) = match self.contraction {
            Contraction::Columns => (block, strip),
            Contraction::Rows => (strip, block),
        };
        let count = PANEL.min(self.rows - rows * PANEL);
        let from = &self.w[(panel * self.rows + rows * PANEL) * PANEL..][..count * PANEL];
        let next = match self.contraction {
            Contraction::Columns => (panel * self.rows + (rows + 1) * PANEL) * PANEL,
            Contraction::Rows => ((panel + 1) * self.rows + rows * PANEL) * PANEL,
        };
        for row in 0..count {
            prefetch::<_MM_HINT_T1>(self.w.as_ptr().wrapping_add(next + row * PANEL).cast());
        }
        let make = match self.contraction {
            Contraction::Columns => transposed,
            Contraction::Rows => interleaved,
        };
        // SAFETY: passed on.
        unsafe {
            if count == PANEL {
                return make(from.as_ptr(), to);
            }
            let mut padded = [bf16::ZERO; PANEL * PANEL];
            padded[..from.len()].copy_from_slice(from);
            make(padded.as_ptr(), to);
        }
    }
}

/// Pairs of elements of 32 rows of a panel, transposed.
///
/// # Safety
/// The rows are there; `to` has two tiles; the processor has the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn transposed(from: *const bf16, to: *mut f32) {
    for half in [0, LANES] {
        let mut tile = [_mm512_setzero_ps(); LANES];
        for (i, row) in tile.iter_mut().enumerate() {
            // SAFETY: 32 bf16 are as long as 16 f32.
            *row = unsafe { _mm512_loadu_ps(from.add((half + i) * PANEL).cast()) };
        }
        // SAFETY: passed on.
        unsafe {
            __m512::transpose(&mut tile);
            for (i, units) in tile.iter().enumerate() {
                _mm512_store_ps(to.add((half + i) * LANES), *units);
            }
        }
    }
}

/// Each two of 32 rows of a panel, element by element.
///
/// # Safety
/// The rows are there; `to` has two tiles; the processor has the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn interleaved(from: *const bf16, to: *mut f32) {
    for pair in 0..LANES {
        for half in [0, LANES] {
            let at = from.wrapping_add(2 * pair * PANEL + half);
            // SAFETY: passed on.
            unsafe {
                let [even, odd] = [at, at.add(PANEL)].map(|at| _mm512_cvtepu16_epi32(_mm256_loadu_si256(at.cast())));
                let both = _mm512_or_si512(even, _mm512_slli_epi32::<16>(odd));
                _mm512_store_ps(to.add((half + pair) * LANES), _mm512_castsi512_ps(both));
            }
        }
    }
}

/// The tile registers, configured for this thread until this goes.
struct Tiles {
    tokens: usize,
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

impl Tiles {
    fn new() -> Self {
        let mut tiles = Self { tokens: 0 };
        tiles.configure(PANEL);
        tiles
    }

    /// For sums of so many tokens, of which the first 16 are in the tiles 0 and 1, their elements in 4; the others in 2, 3 and 5,
    /// which cannot be empty.
    fn configure(&mut self, tokens: usize) {
        if self.tokens == tokens {
            return;
        }
        self.tokens = tokens;
        let above = tokens.min(LANES) as u8;
        let below = tokens.saturating_sub(LANES).max(1) as u8;
        let mut lines = [0; 16];
        lines[..8].copy_from_slice(&[above, above, below, below, above, below, 16, 16]);
        let mut bytes = [0; 16];
        bytes[..8].fill(64);
        let configuration = Configuration { palette: 1, start: 0, reserved: [0; 14], bytes, lines };
        // SAFETY: only called where the instructions are; no other code uses these registers.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack, preserves_flags)) };
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
    }
}

/// Where up to 32 x 32 sums go.
#[derive(Clone, Copy)]
struct Sums {
    y: *mut f32,
    ldy: usize,
    accumulate: bool,
    tokens: usize,
}

/// Tiles of both sides.
#[derive(Clone, Copy)]
struct Factors {
    left: *const f32,
    right: *const f32,
    /// Blocks of the contraction.
    depth: usize,
    parts: usize,
}

impl Factors {
    /// 32 columns of sums.
    ///
    /// # Safety
    /// The tiles are there, y has the tokens and 32 columns, and the registers are configured for them.
    unsafe fn multiply(&self, sums: Sums, edge: &mut [f32]) {
        let Sums { y, ldy, accumulate, tokens } = sums;
        // Where there is no 17th token, its tiles' only line goes nowhere.
        let below = if tokens > LANES { y.wrapping_add(LANES * ldy) } else { edge.as_mut_ptr() };
        // SAFETY: passed on.
        unsafe {
            asm!(
                "test {accumulate}, {accumulate}",
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
                "mov {part}, {parts}",
                "4:",
                "tileloadd tmm4, [{left} + {line}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{left} + {line} + 1024]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {left}, 2048",
                "dec {part}",
                "jnz 4b",
                "add {right}, 2048",
                "dec {depth}",
                "jnz 3b",
                "tilestored [{y} + {row}], tmm0",
                "tilestored [{y} + {row} + 64], tmm1",
                "tilestored [{below} + {row}], tmm2",
                "tilestored [{below} + {row} + 64], tmm3",
                accumulate = in(reg) usize::from(accumulate),
                y = in(reg) y,
                below = in(reg) below,
                row = in(reg) ldy * size_of::<f32>(),
                line = in(reg) 64_usize,
                left = inout(reg) self.left => _,
                right = inout(reg) self.right => _,
                depth = inout(reg) self.depth => _,
                parts = in(reg) self.parts,
                part = out(reg) _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }

    /// Fewer columns, by way of `edge`.
    ///
    /// # Safety
    /// The tiles are there, y has the tokens and columns, and the registers are configured for them.
    unsafe fn multiply_edge(&self, sums: Sums, columns: usize, edge: &mut [f32]) {
        let Sums { y, ldy, accumulate, tokens } = sums;
        let (edge, nowhere) = edge.split_at_mut(PANEL * PANEL);
        // SAFETY: passed on.
        unsafe {
            if accumulate {
                for (row, edge) in edge.chunks_exact_mut(PANEL).take(tokens).enumerate() {
                    std::ptr::copy_nonoverlapping(y.add(row * ldy), edge.as_mut_ptr(), columns);
                }
            }
            self.multiply(Sums { y: edge.as_mut_ptr(), ldy: PANEL, ..sums }, nowhere);
            for (row, edge) in edge.chunks_exact(PANEL).take(tokens).enumerate() {
                std::ptr::copy_nonoverlapping(edge.as_ptr(), y.add(row * ldy), columns);
            }
        }
    }
}
