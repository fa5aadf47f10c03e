// What a linear layer with adapters does: dropout, sums and bias, and the adapters' products. Included by tests.cpp, behind the names
// of the kernels.
#pragma once

// As src/ops/lora.rs has it; the constants there and here must not drift apart.
uint32_t dropout_hash(uint64_t seed, uint32_t index) {
    uint32_t h = index ^ uint32_t(seed);
    for (int round = 0; round < 2; ++round) {
        h = (h ^ h >> 16) * 0x85ebca6bu;
        h = (h ^ h >> 13) * 0xc2b2ae35u;
        h = (h ^ h >> 16) + uint32_t(seed >> 32);
    }
    return h;
}

template <class T>
void test_lora(int n, size_t shift) {
    const auto x = random<T>(n, 1, 0, 1, shift), old = random<T>(n, 2);
    const uint64_t seed = 0x123456789abcdefull;
    const double p = 0.3;
    const uint32_t limit = uint32_t(p * 4294967296.0);
    const float scale = float(1 / (1 - p));
    for (bool accumulate : {false, true}) {
        Buffer<T> dropped(old), summed(old), biased(old);
        emulate::launch(dim3(2), dim3(64), 0, [&] { Kernels<T>::dropout(x.data(), dropped.data(), n, seed, limit, scale, accumulate); });
        emulate::launch(dim3(2), dim3(64), 0, [&] { Kernels<T>::add(x.data(), summed.data(), n, 1.5f, accumulate); });
        Reference want_dropped, want_summed;
        for (int i = 0; i < n; ++i) {
            const double before = accumulate ? real(old[i]) : 0;
            want_dropped.push_back(before + (dropout_hash(seed, uint32_t(i)) < limit ? 0.0 : real(x[i]) * scale));
            want_summed.push_back(before + 1.5 * real(x[i]));
        }
        close(with("dropout", {{"n", n}, {"shift", double(shift)}, {"accumulate", accumulate}}), dropped.data(), want_dropped);
        close(with("add", {{"n", n}, {"shift", double(shift)}, {"accumulate", accumulate}}), summed.data(), want_summed);
    }
    const int rows = 3;
    const auto bias = random<float>(n, 4, 0, 1, shift);
    Buffer<T> y(random<T>(rows * (n + 8), 3));
    Reference want;
    for (int i = 0; i < rows * (n + 8); ++i) want.push_back(real(y[i]) + (i % (n + 8) < n ? real(bias[i % (n + 8)]) : 0));
    emulate::launch(dim3(rows), dim3(64), 0, [&] { Kernels<T>::add_bias(y.data(), bias.data(), n, n + 8); });
    close(with("add_bias", {{"n", n}, {"shift", double(shift)}}), y.data(), want);
}

template <class T>
void test_loras() {
    for (int n : SIZES) test_lora<T>(n, 0);
    test_lora<T>(64, 1);
}

// --- lora_mma ---

struct LoraCase {
    int tokens, cols, gap, shares;  // `gap`: what rows of y are wider than the adapters' columns; `shares` of a sum
    double p;
    bool with_dx;
    std::vector<std::pair<int, int>> adapters;  // columns, ranks

    std::string name(const char* kernel) const {
        return with(kernel, {{"tokens", tokens}, {"cols", cols}, {"gap", gap}, {"shares", shares}, {"p", p}, {"dx", with_dx}, {"adapters", adapters.size()},
                             {"columns", adapters[0].first}, {"ranks", adapters[0].second}});
    }
};

#define LORA_MMA(type) lora_down_##type, lora_up_##type, lora_down_grad_##type, lora_gradients_##type

template <class T, class Down, class Up, class DownGrad, class Gradients>
void test_lora_mma(const LoraCase& c, Down down, Up up, DownGrad down_grad, Gradients gradients) {
    const int tokens = c.tokens, cols = c.cols;
    // Adapters with columns of y between them, B's behind one another after something else.
    std::vector<Adapter> adapters;
    int outs = c.gap, ranks = 0, tiles = 0, parts = 0;
    i64 elements = 8;
    for (const auto& [columns, rank] : c.adapters) {
        adapters.push_back({elements, outs, columns, ranks, rank, 0.5f + float(ranks), 0});
        outs += columns + c.gap;
        ranks += rank;
        elements += i64(columns) * rank;
        tiles += (columns + 63) / 64;
        parts += (rank + MOST_RANKS - 1) / MOST_RANKS;
    }
    const int groups = (ranks + MOST_RANKS - 1) / MOST_RANKS;
    const auto x = random<T>(tokens * cols, 1), dy = random<T>(tokens * outs, 2), a = random<T>(ranks * cols, 3), b = random<T>(elements, 4);
    const auto h = random<T>(tokens * ranks, 5), dh = random<T>(tokens * ranks, 6), old_y = random<T>(tokens * outs, 7), old_dx = random<T>(tokens * cols, 8);
    const auto old_da = random<float>(ranks * cols, 9), old_db = random<float>(elements, 10);
    const uint64_t seed = 0x123456789abcdefull;
    const uint32_t limit = uint32_t(c.p * 4294967296.0);
    const float keep = float(1 / (1 - c.p));
    const auto mask = [&](int i) { return limit && dropout_hash(seed, uint32_t(i)) < limit ? 0.0 : double(keep); };
    const auto dropped = [&](int i) { return real(check::rounded<T>(real(x[i]) * mask(i))); };

    Buffer<T> got_h(tokens * ranks), got_dh(tokens * ranks), y(old_y), dx(old_dx);
    Buffer<float> da(old_da), db(old_db);
    const unsigned narrow = (tokens + 15) / 16, shares = c.shares;
    Buffer<float> partial(size_t(shares) * std::max(groups, parts) * tokens * MOST_RANKS);
    const std::vector<int> zeros(narrow * std::max(groups, parts));
    std::vector<int> done(zeros);
    emulate::launch(dim3(narrow, groups, shares), dim3(256), 0,
                    [&] { down(x.data(), a.data(), got_h.data(), partial.data(), done.data(), tokens, cols, ranks, seed, limit, keep); });
    emulate::launch(dim3((tokens + 63) / 64, tiles), dim3(128), 0, [&] { up(h.data(), b.data(), adapters.data(), y.data(), tokens, ranks, outs); });
    emulate::launch(dim3(narrow, parts, shares), dim3(256), 0,
                    [&] { down_grad(dy.data(), b.data(), adapters.data(), got_dh.data(), partial.data(), done.data(), tokens, ranks, outs); });
    emulate::launch(dim3((cols + 63) / 64 + tiles), dim3(128), 0, [&] {
        gradients(x.data(), dy.data(), h.data(), dh.data(), a.data(), c.with_dx ? dx.data() : nullptr, da.data(), db.data(), adapters.data(),
                  tokens, cols, ranks, outs, seed, limit, keep);
    });

    Reference want_h(tokens * ranks), want_dh(tokens * ranks), want_y(tokens * outs), want_dx(tokens * cols), want_da(ranks * cols), want_db(elements);
    for (size_t i = 0; i < want_y.size(); ++i) want_y[i] = real(old_y[i]);
    for (size_t i = 0; i < want_db.size(); ++i) want_db[i] = old_db[i];
    for (int rank = 0; rank < ranks; ++rank)
        for (int col = 0; col < cols; ++col) {
            double sum = old_da[rank * cols + col];
            for (int t = 0; t < tokens; ++t) sum += real(dh[t * ranks + rank]) * dropped(t * cols + col);
            want_da[rank * cols + col] = sum;
        }
    for (int t = 0; t < tokens; ++t) {
        for (int rank = 0; rank < ranks; ++rank)
            for (int col = 0; col < cols; ++col) want_h[t * ranks + rank] += dropped(t * cols + col) * real(a[rank * cols + col]);
        for (int col = 0; col < cols; ++col) {
            double sum = 0;
            for (int rank = 0; rank < ranks; ++rank) sum += real(dh[t * ranks + rank]) * real(a[rank * cols + col]);
            want_dx[t * cols + col] = real(old_dx[t * cols + col]) + (c.with_dx ? sum * mask(t * cols + col) : 0.0);
        }
        for (const Adapter& adapter : adapters)
            for (int col = 0; col < adapter.columns; ++col)
                for (int rank = 0; rank < adapter.ranks; ++rank) {
                    const double s = adapter.scale, b_value = real(b[adapter.b + col * adapter.ranks + rank]);
                    const size_t of_y = t * outs + adapter.column + col, of_h = t * ranks + adapter.rank + rank;
                    want_y[of_y] += s * real(h[of_h]) * b_value;
                    want_dh[of_h] += s * real(dy[of_y]) * b_value;
                    want_db[adapter.b + col * adapter.ranks + rank] += s * real(dy[of_y]) * real(h[of_h]);
                }
    }
    close(c.name("lora_down"), got_h.data(), want_h, 1e-4);
    close(c.name("lora_up"), y.data(), want_y, 1e-4);
    close(c.name("lora_down_grad"), got_dh.data(), want_dh, 1e-3);
    close(c.name("lora_gradients dA"), da.data(), want_da, 1e-4);
    close(c.name("lora_gradients dB"), db.data(), want_db, 1e-3);
    close(c.name("lora_gradients dx"), dx.data(), want_dx, 1e-4);
    check::equal(c.name("lora shares done"), done.data(), zeros.data(), zeros.size());
}

// Fewer tokens and columns than a tile, more than one, ends within one; one adapter and several, their ranks within and beyond one
// step of a product and what a block has at a time; without dropout, and without a gradient of x.
template <class T, class... Kernels>
void test_loras_mma(Kernels... kernels) {
    const LoraCase cases[] = {{5, 40, 0, 1, 0.0, true, {{16, 2}}},
                              {70, 96, 8, 2, 0.3, true, {{72, 8}, {24, 8}}},
                              {33, 328, 0, 3, 0.1, false, {{64, 16}, {136, 6}, {8, 20}}},
                              {64, 64, 0, 1, 0.5, true, {{64, 64}}},
                              {20, 72, 8, 2, 0.2, true, {{40, 66}, {64, 130}}}};
    for (const LoraCase& c : cases) test_lora_mma<T>(c, kernels...);
}
