// SPDX-License-Identifier: MIT
//
// C functions over native/src/prefetch/gain.hpp.

#include "prefetch/gain.hpp"

extern "C" {

rotary::prefetch_gain * prefetch_gain_new() {
    return new rotary::prefetch_gain;
}

void prefetch_gain_free(rotary::prefetch_gain * gain) {
    delete gain;
}

void prefetch_gain_learn(rotary::prefetch_gain * gain, int distance, int rank, bool right) {
    gain->learn(distance, rank, right);
}

bool prefetch_gain_trusts(rotary::prefetch_gain * gain, int distance, int rank) {
    return gain->trusts(distance, rank);
}

void prefetch_gain_count_read(rotary::prefetch_gain * gain, size_t bytes) {
    gain->count_read(bytes);
}

void prefetch_gain_count_layer(rotary::prefetch_gain * gain, double us) {
    gain->count_layer(us);
}

double prefetch_gain_layer_us(rotary::prefetch_gain * gain) {
    return gain->layer_us();
}

int prefetch_gain_depth(rotary::prefetch_gain * gain, size_t window) {
    return gain->depth(window);
}

void prefetch_gain_count(rotary::prefetch_gain * gain, double gain_us, double cost_us) {
    gain->count_gain(gain_us);
    gain->count_cost(cost_us);
}

bool prefetch_gain_pays(rotary::prefetch_gain * gain) {
    return gain->pays();
}
}
