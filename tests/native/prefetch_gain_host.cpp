// SPDX-License-Identifier: MIT
//
// C functions over native/src/prefetch/gain.hpp.

#include "prefetch/gain.hpp"

extern "C" {

rotary::prefetch_gain * experience_new() {
    return new rotary::prefetch_gain;
}

void experience_free(rotary::prefetch_gain * its) {
    delete its;
}

void experience_learn(rotary::prefetch_gain * its, int distance, int rank, bool right) {
    its->learn(distance, rank, right);
}

bool experience_trusts(rotary::prefetch_gain * its, int distance, int rank) {
    return its->trusts(distance, rank);
}

void experience_count_read(rotary::prefetch_gain * its, size_t bytes) {
    its->count_read(bytes);
}

void experience_count_layer(rotary::prefetch_gain * its, double us) {
    its->count_layer(us);
}

double experience_layer_us(rotary::prefetch_gain * its) {
    return its->layer_us();
}

int experience_depth(rotary::prefetch_gain * its, size_t window) {
    return its->depth(window);
}

void experience_count(rotary::prefetch_gain * its, double gain_us, double cost_us) {
    its->count_gain(gain_us);
    its->count_cost(cost_us);
}

bool experience_pays(rotary::prefetch_gain * its) {
    return its->pays();
}
}
