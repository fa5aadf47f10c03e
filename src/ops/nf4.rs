//! 4-bit weights: NF4 and FP4 in blocks of 64, with the scales kept as f32 or quantized once more.
//!
//! A block of 64 consecutive values (of the flattened matrix, so a block may span rows; the last may be short) is stored
//! as its largest magnitude `absmax` and 64 codes: `x ≈ code[c] · absmax`. NF4's 16 levels are the quantiles of a normal
//! distribution, which weights follow; FP4 is a sign, a two-bit exponent and a mantissa bit. With double quantization
//! the scales themselves, less their mean, become 8-bit codes in blocks of 256. (Dettmers et al. 2023, QLoRA,
//! arXiv:2305.14314.) Codes and bytes are those of bitsandbytes, so its checkpoints load as they are.
//!
//! Here is the format and its CPU code, on plain slices: values come in as f32, and the caller rounds what comes out to
//! its own type. The CUDA twins are `nf4_*` in `kernels/nf4.cu`; products with such a weight are in `ops/weight.rs` and, on a device,
//! `ops/nf4_product.rs`.

#[cfg(target_arch = "x86_64")]
use super::simd;
use candle_core::{Result, bail};

/// Values that share one scale.
pub const QUANT_BLOCK: usize = 64;
/// Scales that share one scale, with double quantization.
pub const NESTED_BLOCK: usize = 256;
/// bitsandbytes divides by at least this, so that a block of denormal values does not divide by zero.
pub(super) const SMALLEST_ABSMAX: f32 = 1e-38;

/// Which 16 levels the codes stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind4 {
    /// Quantiles of the normal distribution; ascending.
    Nf4,
    /// Sign, two bits of exponent, one of mantissa; codes 0 and 8 are both zero.
    Fp4,
}

const NF4_LEVELS: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];
const FP4_LEVELS: [f32; 16] = [
    0.0,
    0.005_208_333_5,
    0.666_666_7,
    1.0,
    0.333_333_34,
    0.5,
    0.166_666_67,
    0.25,
    0.0,
    -0.005_208_333_5,
    -0.666_666_7,
    -1.0,
    -0.333_333_34,
    -0.5,
    -0.166_666_67,
    -0.25,
];
/// Codes from the lowest level to the highest; FP4's second zero is never written.
const NF4_ASCENDING: [u8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
const FP4_ASCENDING: [u8; 15] = [11, 10, 13, 12, 15, 14, 9, 0, 1, 6, 7, 4, 5, 2, 3];

/// Both levels of every byte, first value (high half) first: one load and one multiplication for two values.
type Pairs = [[f32; 2]; 256];
static NF4_PAIRS: Pairs = pairs(&NF4_LEVELS);
static FP4_PAIRS: Pairs = pairs(&FP4_LEVELS);
/// Where a value stops being nearest to a level; the same values as in `kernels/nf4.cu`.
static NF4_LIMITS: [f32; 15] = limits(&NF4_LEVELS, &NF4_ASCENDING);
static FP4_LIMITS: [f32; 15] = limits(&FP4_LEVELS, &FP4_ASCENDING);

const fn pairs(levels: &[f32; 16]) -> Pairs {
    let mut all = [[0.0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        all[byte] = [levels[byte >> 4], levels[byte & 15]];
        byte += 1;
    }
    all
}

/// `limits[i]`: a value above it gets the level of rank `i + 1` or higher, others that of rank `i` or lower.
///
/// That is the midpoint as f32 rounds it, which is what bitsandbytes compares with: where it falls between two f32s, a
/// value beside it may get the second nearest level, and exactly half way goes to the lower. Unused entries are infinite.
const fn limits<const N: usize>(levels: &[f32; 16], ascending: &[u8; N]) -> [f32; 15] {
    let mut all = [f32::INFINITY; 15];
    let mut rank = 0;
    while rank + 1 < N {
        all[rank] = midpoint(levels[ascending[rank] as usize], levels[ascending[rank + 1] as usize]);
        rank += 1;
    }
    all
}

const fn midpoint(low: f32, high: f32) -> f32 {
    (low + high) / 2.0
}

impl Kind4 {
    /// The level of each code.
    #[must_use]
    pub const fn levels(self) -> &'static [f32; 16] {
        match self {
            Self::Nf4 => &NF4_LEVELS,
            Self::Fp4 => &FP4_LEVELS,
        }
    }

    /// The name in `quantization_config` and on the command line: `nf4` or `fp4`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
        }
    }

    const fn pairs(self) -> &'static Pairs {
        match self {
            Self::Nf4 => &NF4_PAIRS,
            Self::Fp4 => &FP4_PAIRS,
        }
    }

    const fn limits(self) -> &'static [f32; 15] {
        match self {
            Self::Nf4 => &NF4_LIMITS,
            Self::Fp4 => &FP4_LIMITS,
        }
    }

    const fn ascending(self) -> &'static [u8] {
        match self {
            Self::Nf4 => &NF4_ASCENDING,
            Self::Fp4 => &FP4_ASCENDING,
        }
    }

    /// The codes of a block of values that were divided by their scale. Ranks are counted without a branch, which the
    /// compiler turns into vector compares.
    pub(super) fn codes(self, scaled: &[f32; QUANT_BLOCK]) -> [u8; QUANT_BLOCK] {
        let mut ranks = [0u32; QUANT_BLOCK];
        for limit in self.limits() {
            for (rank, s) in ranks.iter_mut().zip(scaled) {
                *rank += u32::from(s > limit);
            }
        }
        ranks.map(|rank| self.ascending()[rank as usize])
    }

    /// The code of one such value.
    pub(super) fn code(self, scaled: f32) -> u8 {
        let rank: usize = self.limits().iter().map(|limit| usize::from(scaled > *limit)).sum();
        self.ascending()[rank]
    }
}

/// The scale of each block of [`QUANT_BLOCK`] values.
#[derive(Debug, Clone, PartialEq)]
pub enum Absmax {
    /// As it is.
    Plain(Vec<f32>),
    /// Quantized once more: block `i` has the scale `nested_code()[codes[i]] · nested_absmax[i / 256] + offset`.
    Double {
        /// One code per block.
        codes: Vec<u8>,
        /// The scale of each [`NESTED_BLOCK`] codes.
        nested_absmax: Vec<f32>,
        /// The mean of all scales.
        offset: f32,
    },
}

impl Absmax {
    /// Number of scales.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Plain(absmax) => absmax.len(),
            Self::Double { codes, .. } => codes.len(),
        }
    }

    /// Whether there is none, which is so for an empty matrix alone.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes in memory; the code book, which all share, is not counted.
    #[must_use]
    pub fn byte_count(&self) -> usize {
        match self {
            Self::Plain(absmax) => absmax.len() * 4,
            Self::Double { codes, nested_absmax, .. } => codes.len() + nested_absmax.len() * 4 + 4,
        }
    }

    /// The scale of block `i`. Product and sum are rounded apart, as bitsandbytes and the CUDA kernel do.
    ///
    /// # Panics
    /// If `i` is not below [`Self::len`].
    #[inline]
    #[must_use]
    pub fn get(&self, i: usize) -> f32 {
        match self {
            Self::Plain(absmax) => absmax[i],
            Self::Double { codes, nested_absmax, offset } => {
                NESTED_CODE[codes[i] as usize] * nested_absmax[i / NESTED_BLOCK] + offset
            }
        }
    }

    pub(super) fn double(absmax: &[f32]) -> Self {
        let offset = torch_sum(absmax) / absmax.len().max(1) as f32;
        let mut codes = Vec::with_capacity(absmax.len());
        let mut nested_absmax = Vec::with_capacity(absmax.len().div_ceil(NESTED_BLOCK));
        for block in absmax.chunks(NESTED_BLOCK) {
            let largest = block.iter().fold(0f32, |m, a| m.max((a - offset).abs()));
            let inverse = 1.0 / largest.max(SMALLEST_ABSMAX);
            nested_absmax.push(largest);
            codes.extend(block.iter().map(|a| {
                let scaled = (a - offset) * inverse;
                // bitsandbytes divides 0 by 0 where all scales are equal, and has no code below that.
                if largest == 0.0 { 0 } else { nested_code_of(scaled) }
            }));
        }
        Self::Double { codes, nested_absmax, offset }
    }
}

/// The sum as `torch.sum` adds it up on a processor with AVX2, of which the mean is part of the format's bits.
///
/// Four vectors of 8 take rows of 32 values. Every `2^power` rows their sums move up a level, four levels in all, so that
/// small values do not drown in a large sum; then the levels, the odd vectors, the four vectors, the tail and the 8 lanes
/// are added in this order.
fn torch_sum(values: &[f32]) -> f32 {
    const LANES: usize = 8;
    const ROW: usize = 4 * LANES;
    fn add<const N: usize>(to: &mut [f32; N], from: &[f32; N]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to += from;
        }
    }
    let (rows, rest) = values.as_chunks::<ROW>();
    let power = (rows.len().max(1).next_power_of_two().ilog2() / 4).max(4);
    let mut levels = [[0f32; ROW]; 4];
    for (i, row) in rows.iter().enumerate() {
        add(&mut levels[0], row);
        let done = i + 1;
        let mut level = 1;
        while level < 4 && done.trailing_zeros() >= power * level as u32 {
            let moved = std::mem::replace(&mut levels[level - 1], [0.0; ROW]);
            add(&mut levels[level], &moved);
            level += 1;
        }
    }
    let [mut row, upper @ ..] = levels;
    for level in &upper {
        add(&mut row, level);
    }
    let (vectors, _) = row.as_chunks::<LANES>();
    let mut lanes = vectors[0];
    let (odd, tail) = rest.as_chunks::<LANES>();
    for vector in odd.iter().chain(&vectors[1..]) {
        add(&mut lanes, vector);
    }
    let tail = tail.iter().fold(0.0, |sum, v| sum + v);
    lanes.iter().fold(tail, |sum, v| sum + v)
}

/// The code book of double quantization: bitsandbytes' signed dynamic map of 8 bits, ascending.
///
/// Seven decades, each cut into twice as many steps as the one below, mirrored, with 0 and 1 added: fine near zero,
/// coarse near one. (Dettmers et al. 2022, arXiv:2110.02861.)
#[must_use]
pub const fn nested_code() -> &'static [f32; 256] {
    &NESTED_CODE
}

static NESTED_CODE: [f32; 256] = dynamic_map();
static NESTED_LIMITS: [f32; 255] = nested_limits();

/// The code of a value from -1 to 1: that of the nearest entry to the nearest of 65,536 points, for each of which
/// bitsandbytes 0.50 keeps the code in a table on the CPU.
fn nested_code_of(value: f32) -> u8 {
    const HALF: f32 = 32_767.5;
    let point = ((value + 1.0) * HALF + 0.5).floor() / HALF - 1.0;
    NESTED_LIMITS.partition_point(|&limit| point > limit) as u8
}

/// In f32 and in the order of `torch.linspace`, from both ends to the middle, so that every bit agrees.
const fn dynamic_map() -> [f32; 256] {
    let mut map = [0.0; 256];
    map[255] = 1.0;
    let mut at = 1; // of the positive half, whose 0 stands at 127
    let mut decade = 0;
    let powers = [1e-6f32, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];
    while decade < powers.len() {
        let steps = 1usize << decade;
        let mut i = 0;
        while i < steps {
            let mean = (boundary(i, steps) + boundary(i + 1, steps)) / 2.0;
            map[127 + at] = powers[decade] * mean;
            map[127 - at] = -(powers[decade] * mean);
            at += 1;
            i += 1;
        }
        decade += 1;
    }
    map
}

/// Entry `i` of `torch.linspace(0.1, 1, steps + 1)`, which fuses its multiply and add: in f64 both are exact here.
const fn boundary(i: usize, steps: usize) -> f32 {
    let step = ((1.0f32 - 0.1) / steps as f32) as f64;
    if i < steps.div_ceil(2) {
        (0.1f32 as f64 + step * i as f64) as f32
    } else {
        (1.0 - step * (steps - i) as f64) as f32
    }
}

const fn nested_limits() -> [f32; 255] {
    let mut all = [0.0; 255];
    let mut i = 0;
    while i < 255 {
        all[i] = midpoint(NESTED_CODE[i], NESTED_CODE[i + 1]);
        i += 1;
    }
    all
}

/// A matrix in 4 bits a value.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantized {
    /// Which levels.
    pub kind: Kind4,
    /// Two codes a byte, the first value in the high half; row after row without a gap.
    pub packed: Vec<u8>,
    /// One scale per [`QUANT_BLOCK`] values.
    pub absmax: Absmax,
    /// Rows of the matrix (outputs of the layer).
    pub rows: usize,
    /// Columns of the matrix (inputs of the layer).
    pub cols: usize,
}

impl Quantized {
    /// Quantizes a matrix; with `double` its scales as well.
    ///
    /// # Shapes
    /// `values`: (rows, cols), row after row.
    ///
    /// # Errors
    /// If `values` has another length.
    pub fn quantize(values: &[f32], rows: usize, cols: usize, kind: Kind4, double: bool) -> Result<Self> {
        if values.len() != rows * cols {
            bail!("nf4 quantize: values must be (rows, cols) = ({rows}, {cols}), got {} values", values.len());
        }
        let mut packed = Vec::with_capacity(values.len().div_ceil(2));
        let mut absmax = Vec::with_capacity(values.len().div_ceil(QUANT_BLOCK));
        for block in values.chunks(QUANT_BLOCK) {
            let largest = block.iter().fold(0f32, |m, v| m.max(v.abs()));
            absmax.push(largest);
            pack_block(block, 1.0 / largest.max(SMALLEST_ABSMAX), kind, &mut packed);
        }
        let absmax = if double { Absmax::double(&absmax) } else { Absmax::Plain(absmax) };
        Ok(Self { kind, packed, absmax, rows, cols })
    }

    /// A matrix from stored parts, as a checkpoint brings them.
    ///
    /// # Errors
    /// If the parts do not fit together.
    pub fn from_parts(kind: Kind4, packed: Vec<u8>, absmax: Absmax, rows: usize, cols: usize) -> Result<Self> {
        let n = rows * cols;
        if packed.len() != n.div_ceil(2) {
            bail!(
                "nf4: packed must have {} bytes for (rows, cols) = ({rows}, {cols}), got {}",
                n.div_ceil(2),
                packed.len()
            );
        }
        let blocks = n.div_ceil(QUANT_BLOCK);
        if absmax.len() != blocks {
            bail!("nf4: absmax must be ({blocks},) for (rows, cols) = ({rows}, {cols}), got ({},)", absmax.len());
        }
        if let Absmax::Double { nested_absmax, .. } = &absmax
            && nested_absmax.len() != blocks.div_ceil(NESTED_BLOCK)
        {
            bail!("nf4: nested absmax must be ({},), got ({},)", blocks.div_ceil(NESTED_BLOCK), nested_absmax.len());
        }
        Ok(Self { kind, packed, absmax, rows, cols })
    }

    /// All values, as f32.
    ///
    /// # Errors
    /// If `out` is not (rows, cols) long.
    pub fn dequantize_into(&self, out: &mut [f32]) -> Result<()> {
        self.dequantize_rows(0, self.rows, out)
    }

    /// The values of some rows, as f32: what a product needs of a weight at a time.
    ///
    /// # Shapes
    /// `out`: (n_rows, cols).
    ///
    /// # Errors
    /// If the rows do not exist or `out` has another length.
    pub fn dequantize_rows(&self, first_row: usize, n_rows: usize, out: &mut [f32]) -> Result<()> {
        if first_row.checked_add(n_rows).is_none_or(|end| end > self.rows) {
            bail!("nf4 dequantize: rows must be within 0..{}, got {n_rows} from {first_row}", self.rows);
        }
        if out.len() != n_rows * self.cols {
            bail!("nf4 dequantize: out must be (n_rows, cols) = ({n_rows}, {}), got {}", self.cols, out.len());
        }
        let mut at = first_row * self.cols;
        let mut rest = out;
        while !rest.is_empty() {
            let block = at / QUANT_BLOCK;
            let n = ((block + 1) * QUANT_BLOCK - at).min(rest.len());
            let (now, later) = rest.split_at_mut(n);
            self.dequantize_within_block(at, self.absmax.get(block), now);
            at += n;
            rest = later;
        }
        Ok(())
    }

    /// Values `at..at + out.len()`, all of one block. Rows of odd length start and end within a byte.
    #[inline]
    fn dequantize_within_block(&self, at: usize, absmax: f32, out: &mut [f32]) {
        let pairs = self.kind.pairs();
        let (head, even) = out.split_at_mut(at % 2);
        if let [value] = head {
            *value = pairs[self.packed[at / 2] as usize][1] * absmax;
        }
        let bytes = &self.packed[at.div_ceil(2)..];
        #[cfg(target_arch = "x86_64")]
        let (bytes, even) = match simd::level() {
            Some(level) => {
                let done = simd::decode_4_bits(level, self.kind.levels(), bytes, absmax, even);
                (&bytes[done / 2..], &mut even[done..])
            }
            None => (bytes, even),
        };
        let (twos, tail) = even.as_chunks_mut::<2>();
        for (two, &byte) in twos.iter_mut().zip(bytes) {
            let pair = pairs[byte as usize];
            *two = [pair[0] * absmax, pair[1] * absmax];
        }
        if let [value] = tail {
            *value = pairs[bytes[twos.len()] as usize][0] * absmax;
        }
    }

    /// Bytes in memory: codes and scales.
    #[must_use]
    pub fn byte_count(&self) -> usize {
        self.packed.len() + self.absmax.byte_count()
    }
}

/// Appends the codes of one block; an odd tail is filled with the code of zero.
fn pack_block(block: &[f32], inverse: f32, kind: Kind4, packed: &mut Vec<u8>) {
    let mut scaled = [0f32; QUANT_BLOCK];
    for (s, v) in scaled.iter_mut().zip(block) {
        *s = v * inverse;
    }
    let bytes = block.len().div_ceil(2);
    packed.extend(kind.codes(&scaled).as_chunks::<2>().0[..bytes].iter().map(|[a, b]| a << 4 | b));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Deterministic values of about unit size, without a crate.
    fn values(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2).wrapping_add(1);
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        };
        (0..n).map(|_| (uniform() + uniform() + uniform()) * 2.0).collect()
    }

    /// The rule as the module states it, without tables: the nearest level by the midpoints in f32.
    fn nearest(kind: Kind4, scaled: f32) -> f32 {
        let mut levels = *kind.levels();
        levels.sort_by(f32::total_cmp);
        let above = levels.windows(2).filter(|pair| scaled > (pair[0] + pair[1]) / 2.0).count();
        levels[above]
    }

    #[test]
    fn every_value_gets_the_nearest_level() {
        for kind in [Kind4::Nf4, Kind4::Fp4] {
            for (rows, cols) in [(1, 1), (5, 123), (123, 5), (3, 64), (2, 321)] {
                let x = values(rows * cols, 7);
                let q = Quantized::quantize(&x, rows, cols, kind, false).unwrap();
                let mut y = vec![f32::NAN; x.len()];
                q.dequantize_into(&mut y).unwrap();
                for (i, (&x, &y)) in x.iter().zip(&y).enumerate() {
                    let absmax = q.absmax.get(i / QUANT_BLOCK);
                    let want = nearest(kind, x * (1.0 / absmax)) * absmax;
                    assert_eq!(want, y, "{kind:?} ({rows}, {cols}) value {i}: {x}");
                }
            }
        }
    }

    #[test]
    fn half_way_goes_to_the_lower_level() {
        for kind in [Kind4::Nf4, Kind4::Fp4] {
            for (rank, &limit) in kind.limits().iter().enumerate().take(kind.ascending().len() - 1) {
                let q = Quantized::quantize(&[1.0, limit, limit.next_up()], 1, 3, kind, false).unwrap();
                let mut y = [0.0; 3];
                q.dequantize_into(&mut y).unwrap();
                let level = |rank: usize| kind.levels()[kind.ascending()[rank] as usize];
                assert_eq!(y[1..], [level(rank), level(rank + 1)], "{kind:?} rank {rank}");
            }
        }
    }

    #[test]
    fn any_rows_equal_that_part_of_the_whole() {
        for double in [false, true] {
            let (rows, cols) = (41, 123);
            let q = Quantized::quantize(&values(rows * cols, 3), rows, cols, Kind4::Nf4, double).unwrap();
            let mut whole = vec![0.0; rows * cols];
            q.dequantize_into(&mut whole).unwrap();
            for (first, n) in [(0, 1), (1, 1), (2, 5), (7, 34), (40, 1), (41, 0)] {
                let mut part = vec![f32::NAN; n * cols];
                q.dequantize_rows(first, n, &mut part).unwrap();
                assert_eq!(part, whole[first * cols..(first + n) * cols], "{n} rows from {first}");
            }
        }
    }

    #[test]
    fn double_quantization_restores_scales_closely() {
        let x: Vec<f32> =
            values(64 * 700, 5).iter().enumerate().map(|(i, v)| v * (1.0 + (i / 64) as f32 * 1e-3)).collect();
        let plain = Quantized::quantize(&x, 700, 64, Kind4::Nf4, false).unwrap();
        let double = Quantized::quantize(&x, 700, 64, Kind4::Nf4, true).unwrap();
        assert_eq!(plain.packed, double.packed);
        let Absmax::Double { nested_absmax, .. } = &double.absmax else { panic!("not doubly quantized") };
        for i in 0..700 {
            // Steps of the code book are at most 0.0141, so half of one of the nested scale.
            let off = (plain.absmax.get(i) - double.absmax.get(i)).abs();
            assert!(off <= 0.0071 * nested_absmax[i / NESTED_BLOCK], "block {i} is off by {off}");
        }
        assert_eq!(plain.byte_count(), 700 * 32 + 700 * 4);
        assert_eq!(double.byte_count(), 700 * 32 + 700 + 3 * 4 + 4);
    }

    /// What bitsandbytes 0.50.2 gave for the values about the limit of two codes, which the nearest entry is not.
    #[test]
    fn codes_of_scales_go_by_a_grid() {
        let (below, above) = (NESTED_CODE[90], NESTED_CODE[91]);
        let value = -0.024_058_389_f32;
        assert!((value - below).abs() > (value - above).abs());
        assert_eq!((nested_code_of(value), nested_code_of(-0.024_04), nested_code_of(-0.024_07)), (90, 91, 90));
        assert_eq!([-1.0, 0.0, 1.0].map(nested_code_of), [0, 131, 255], "0 lies between two points");
    }

    #[test]
    fn equal_scales_have_bitsandbytes_code() {
        let Absmax::Double { codes, nested_absmax, offset } = Absmax::double(&[0.5; 3]) else {
            panic!("one scale each")
        };
        assert_eq!((codes, nested_absmax, offset), (vec![0; 3], vec![0.0], 0.5));
    }

    #[test]
    fn nested_code_ascends_and_mirrors() {
        let code = nested_code();
        assert!(code.windows(2).all(|w| w[0] < w[1]));
        assert_eq!((code[127], code[255]), (0.0, 1.0));
        for i in 1..128 {
            assert_eq!(code[127 + i], -code[127 - i]);
        }
    }

    #[test]
    fn zeros_and_denormals_stay_finite() {
        for double in [false, true] {
            for value in [0.0, 1e-40] {
                let q = Quantized::quantize(&[value; 65], 5, 13, Kind4::Nf4, double).unwrap();
                let mut y = [f32::NAN; 65];
                q.dequantize_into(&mut y).unwrap();
                assert!(y.iter().all(|y| (y - value).abs() <= 1e-38), "{value}: {y:?}");
            }
        }
        let empty = Quantized::quantize(&[], 0, 64, Kind4::Nf4, true).unwrap();
        assert!(empty.absmax.is_empty());
        empty.dequantize_into(&mut []).unwrap();
    }

    #[test]
    fn wrong_sizes_are_named() {
        let message = Quantized::quantize(&[0.0; 5], 2, 3, Kind4::Nf4, false).unwrap_err().to_string();
        assert!(message.contains("(2, 3)") && message.contains("5 values"), "{message}");
        let q = Quantized::quantize(&[0.0; 6], 2, 3, Kind4::Nf4, false).unwrap();
        assert!(q.dequantize_into(&mut [0.0; 5]).is_err());
        assert!(q.dequantize_rows(1, 2, &mut [0.0; 6]).is_err());
        assert!(q.dequantize_rows(usize::MAX, 2, &mut [0.0; 6]).is_err());
        assert!(Quantized::from_parts(Kind4::Nf4, vec![0; 2], Absmax::Plain(vec![1.0]), 2, 3).is_err());
        assert!(Quantized::from_parts(Kind4::Nf4, vec![0; 3], Absmax::Plain(vec![]), 2, 3).is_err());
    }
}
