//! PyTorch's CPU random numbers, as far as the order of training data hangs on them: the generator, `randperm`,
//! `random_split`, and the order in which a shuffling `DataLoader` visits its samples.
//!
//! With these a run sees the same rows in the same order as LitGPT. Random numbers of the model (initial adapters,
//! dropout, sampling) are not made here.
//!
//! The generator is MT19937 (Matsumoto and Nishimura 1998); the draws per call were checked against torch 2.15.

const N: usize = 624;
const M: usize = 397;

/// `torch.Generator` of the CPU.
#[derive(Clone)]
pub struct Generator {
    state: [u32; N],
    next: usize,
}

impl Generator {
    /// `torch.Generator().manual_seed(seed)`; as there, only the low 32 bits of the seed count.
    #[must_use]
    pub fn manual_seed(seed: u64) -> Self {
        let mut state = [0_u32; N];
        state[0] = (seed & u64::from(u32::MAX)) as u32;
        for i in 1..N {
            let previous = state[i - 1];
            state[i] = 1_812_433_253_u32.wrapping_mul(previous ^ (previous >> 30)).wrapping_add(i as u32);
        }
        Self { state, next: N }
    }

    /// The next 32 random bits.
    pub fn random(&mut self) -> u32 {
        if self.next == N {
            self.twist();
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// The next 64 random bits, which takes two draws of 32.
    pub fn random64(&mut self) -> u64 {
        let high = u64::from(self.random());
        high << 32 | u64::from(self.random())
    }

    fn twist(&mut self) {
        for i in 0..N {
            let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % N] & 0x7fff_ffff);
            let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + M) % N] ^ (y >> 1) ^ odd;
        }
        self.next = 0;
    }
}

/// `torch.randperm(n, generator=generator)`: `n - 1` draws.
#[must_use]
pub fn randperm(n: usize, generator: &mut Generator) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    for i in 0..n.saturating_sub(1) {
        let z = generator.random() as usize % (n - i);
        order.swap(i, i + z);
    }
    order
}

/// `torch.utils.data.random_split(range(n), [1.0 - fraction, fraction], manual_seed(seed))`: the rows of the first
/// part, then those of the second.
///
/// Both lengths are rounded down; rows left over go to the first part, then to the second. `fraction` lies in [0, 1].
#[must_use]
pub fn random_split(n: usize, fraction: f64, seed: u64) -> (Vec<usize>, Vec<usize>) {
    let (first, _) = split_lengths(n, fraction);
    let mut order = randperm(n, &mut Generator::manual_seed(seed));
    let second = order.split_off(first);
    (order, second)
}

/// Lengths of the two parts of [`random_split`].
#[must_use]
pub fn split_lengths(n: usize, fraction: f64) -> (usize, usize) {
    let share = |part: f64| (n as f64 * part).floor() as usize;
    let (first, second) = (share(1.0 - fraction), share(fraction));
    let left_over = n.saturating_sub(first + second);
    let first = (first + left_over.div_ceil(2)).min(n);
    (first, n - first)
}

/// Orders in which `DataLoader(dataset, shuffle=True, generator=manual_seed(seed))` visits its samples, one epoch
/// after the other, for any number of workers.
#[derive(Clone)]
pub struct EpochOrders {
    n: usize,
    generator: Generator,
}

impl EpochOrders {
    /// Orders of `n` samples.
    #[must_use]
    pub fn new(n: usize, seed: u64) -> Self {
        Self { n, generator: Generator::manual_seed(seed) }
    }

    /// Order of the next epoch.
    ///
    /// An epoch draws three things from the one generator: the loader's base seed for its workers (64 bits), the
    /// sampler's permutation, and, when the sampler is used up, a second permutation of which it takes no element.
    pub fn next_order(&mut self) -> Vec<usize> {
        self.generator.random64();
        let order = randperm(self.n, &mut self.generator);
        for _ in 0..self.n.saturating_sub(1) {
            self.generator.random();
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// FNV-1a over whole indices.
    fn checksum(indices: &[usize]) -> u64 {
        indices.iter().fold(1_469_598_103_934_665_603, |h, &i| (h ^ i as u64).wrapping_mul(1_099_511_628_211))
    }

    fn perm(n: usize, seed: u64) -> Vec<usize> {
        randperm(n, &mut Generator::manual_seed(seed))
    }

    #[test]
    fn randperm_is_torchs() {
        assert_eq!(perm(0, 42), Vec::<usize>::new());
        assert_eq!(perm(1, 42), [0]);
        assert_eq!(perm(7, 42), [1, 6, 3, 5, 4, 0, 2]);
        assert_eq!(perm(7, 1337), [5, 2, 4, 3, 6, 1, 0]);
        let p = perm(999, 42);
        assert_eq!(
            p[..20],
            [789, 32, 597, 457, 470, 106, 34, 923, 578, 902, 261, 273, 998, 477, 995, 739, 437, 702, 516, 645]
        );
        assert_eq!(checksum(&p), 0xf0f1_bca3_eff1_6914);
        let p = perm(999, 1337);
        assert_eq!(
            p[..20],
            [928, 520, 273, 895, 34, 316, 620, 673, 705, 89, 3, 59, 411, 339, 829, 553, 932, 15, 99, 514]
        );
        assert_eq!(checksum(&p), 0xf728_ddd6_4f99_71de);
    }

    #[test]
    fn only_the_low_half_of_a_seed_counts() {
        assert_eq!(perm(5, 0), [4, 0, 1, 3, 2]);
        assert_eq!(perm(5, (1 << 32) + 5), [1, 3, 0, 4, 2]);
        assert_eq!(perm(5, 5), [1, 3, 0, 4, 2]);
        assert_eq!(perm(5, u64::MAX), [1, 3, 4, 2, 0]);
    }

    #[test]
    fn random_split_is_torchs() {
        let (train, val) = random_split(999, 0.05, 42);
        assert_eq!((train.len(), val.len()), (950, 49));
        assert_eq!(
            val[..20],
            [288, 978, 790, 476, 212, 348, 309, 344, 806, 20, 27, 396, 325, 197, 251, 864, 176, 465, 672, 746]
        );
        assert_eq!((checksum(&train), checksum(&val)), (0xc741_16c8_176d_f3f8, 0xfaa5_9ac6_40be_4099));
        let (train, val) = random_split(999, 0.05, 1337);
        assert_eq!((checksum(&train), checksum(&val)), (0xccad_b096_489d_6eb1, 0xaaec_4047_f841_af34));
        assert_eq!(random_split(10, 0.25, 42), (vec![2, 6, 1, 8, 4, 5, 0, 9], vec![3, 7]));
        assert_eq!(random_split(10, 0.25, 1337), (vec![5, 0, 6, 1, 9, 8, 4, 2], vec![3, 7]));
        assert_eq!(random_split(33, 0.1, 42).1, [28, 22, 11]);
        assert_eq!(split_lengths(51760, 0.03865), (49760, 2000)); // Alpaca
        assert_eq!(split_lengths(10, 0.05), (10, 0));
        assert_eq!(split_lengths(10, 0.0), (10, 0));
        assert_eq!(split_lengths(10, 1.0), (0, 10));
        assert_eq!(split_lengths(0, 0.5), (0, 0));
    }

    #[test]
    fn epochs_are_the_data_loaders() {
        let three = |n, seed| {
            let mut orders = EpochOrders::new(n, seed);
            [orders.next_order(), orders.next_order(), orders.next_order()]
        };
        assert_eq!(three(7, 42), [[4, 5, 3, 6, 1, 0, 2], [6, 2, 4, 5, 3, 1, 0], [2, 1, 0, 4, 6, 5, 3]]);
        assert_eq!(three(7, 1337), [[1, 5, 2, 4, 6, 0, 3], [1, 5, 6, 2, 3, 0, 4], [5, 4, 3, 1, 2, 6, 0]]);
        assert_eq!(three(1, 42), [[0], [0], [0]]);
        let epochs = three(999, 42);
        assert_eq!(
            epochs[2][..20],
            [482, 498, 570, 605, 342, 325, 197, 596, 501, 702, 259, 562, 858, 87, 406, 455, 306, 968, 991, 967]
        );
        assert_eq!(epochs.map(|e| checksum(&e)), [0x56f4_2da5_f6dd_2106, 0x3ec8_8121_9128_a6d4, 0xf612_1311_8c2e_7812]);
        assert_eq!(
            three(999, 1337).map(|e| checksum(&e)),
            [0xe0c2_57b2_d8b3_0c4a, 0x6b7e_938f_4bac_e6c6, 0x332a_16d0_ca95_7012]
        );
    }
}
