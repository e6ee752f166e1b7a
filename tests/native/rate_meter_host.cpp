// SPDX-License-Identifier: MIT
//
// C functions over native/src/store/rate_meter.hpp.

#include "store/rate_meter.hpp"

extern "C" {

rotary::rate_meter * rate_meter_new() {
    return new rotary::rate_meter;
}

void rate_meter_free(rotary::rate_meter * meter) {
    delete meter;
}

void rate_meter_begin(rotary::rate_meter * meter, size_t bytes, uint64_t now_us) {
    meter->begin(bytes, now_us);
}

uint64_t rate_meter_end(rotary::rate_meter * meter, uint64_t now_us, bool waited) {
    return meter->end(now_us, waited);
}

double rate_meter_rate(rotary::rate_meter * meter) {
    return meter->bytes_per_us();
}
}
