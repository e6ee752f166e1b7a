// SPDX-License-Identifier: MIT
//
// C API: a predictor without a pool, for replaying traces. See rotary.h.

#include "rotary.h"

#include "base/error.hpp"
#include "prefetch/predictors/predictor.hpp"

#include <algorithm>
#include <memory>
#include <vector>

struct rotary_foresight {
    std::unique_ptr<rotary::predictor> made;
};

const char * rotary_predictor_names(void) {
    return rotary::guarded("", rotary::predictor_names);
}

rotary_foresight * rotary_foresight_new(const char * predictor, const rotary_predictor * own, int32_t n_layers,
                                        int32_t n_expert) try {
    auto made = rotary::predictor_new(predictor, { n_layers, n_expert, own });
    if (!made) {
        rotary::fail(ROTARY_ERR_ARG, rotary::predictor_not_known(predictor));
        return nullptr;
    }
    return new rotary_foresight{ std::move(made) };
} catch (...) {
    rotary::fail_by_exception();
    return nullptr;
}

void rotary_foresight_free(rotary_foresight * foresight) {
    delete foresight;
}

void rotary_foresight_note(rotary_foresight * foresight, int32_t layer, const int32_t * ids, int32_t n_used,
                           int32_t n_tokens) try {
    foresight->made->note(layer, ids, n_used, n_tokens);
} catch (...) {
    rotary::fail_by_exception();
}

void rotary_foresight_learn(rotary_foresight * foresight, int32_t layer, const float * popularity, const float * pairs,
                            const float * popularity_before, int64_t n_tokens) try {
    foresight->made->learn(layer, popularity, pairs, popularity_before, n_tokens);
} catch (...) {
    rotary::fail_by_exception();
}

int32_t rotary_foresight_name(rotary_foresight * foresight, int32_t layer, int32_t ahead, int32_t * experts,
                              int32_t n) try {
    std::vector<int32_t> named;
    foresight->made->name(layer, ahead, n, named);
    std::copy(named.begin(), named.end(), experts);
    return (int32_t) named.size();
} catch (...) {
    return rotary::fail_by_exception();
}
