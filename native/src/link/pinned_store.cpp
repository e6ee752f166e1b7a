// SPDX-License-Identifier: MIT
//
// Pinned store. See pinned_store.hpp.

#include "link/pinned_store.hpp"

#include "base/error.hpp"
#include "base/memory.hpp"

#include <algorithm>
#include <cstring>
#include <unistd.h>

namespace rotary {

bool pin_parse(const std::string & text, pin_policy & pin) {
    pin = text == "on" ? pin_policy::on : text == "off" ? pin_policy::off : pin_policy::automatic;
    return pin != pin_policy::automatic || text == "auto";
}

bool pinned_store::may_pin(uint64_t bytes, std::string & reason) const {
    const uint64_t available = host_memory_now().available;
    if (policy_ == pin_policy::off) {
        reason = "pin is \"off\"";
        return false;
    }
    if (policy_ == pin_policy::automatic && bytes > available / 4 * 3) {
        reason = format("they take %s, and of the %s available no more than three quarters are locked unasked; set pin "
                        "to \"on\" to lock them all",
                        mib(bytes).c_str(), mib(available).c_str());
        return false;
    }
    return true;
}

bool pinned_store::pin(link & over, const std::vector<const stored_tensor *> & tensors, std::string & reason) {
    if (!ranges_.empty()) {
        return true;
    }
    const uintptr_t    page = sysconf(_SC_PAGESIZE);
    std::vector<range> wanted;
    uint64_t           bytes = 0;
    for (const stored_tensor * tensor : tensors) {
        const auto begin = (uintptr_t) tensor->data / page * page;
        const auto end   = ((uintptr_t) tensor->data + tensor->bytes() + page - 1) / page * page;
        wanted.push_back({ (char *) begin, (char *) end, {} });
        bytes += end - begin;
    }
    if (!may_pin(bytes, reason)) {
        return false;
    }
    std::sort(wanted.begin(), wanted.end(), [](const auto & a, const auto & b) { return a.begin < b.begin; });
    std::vector<range> pinned;
    for (const range & next : wanted) {
        if (!pinned.empty() && next.begin < pinned.back().end) {
            pinned.back().end = std::max(pinned.back().end, next.end); // no page can be pinned twice
        } else {
            pinned.push_back(next);
        }
    }
    for (range & each : pinned) {
        const size_t size = each.end - each.begin;
        each.pages        = over.pin(each.begin, size, true, reason);
        if (!each.pages.memory && policy_ == pin_policy::on) {
            std::string no_copy_either;
            each.pages = over.new_pinned(size, no_copy_either);
            if (each.pages.memory) {
                memcpy(each.pages.memory.get(), each.begin, size);
            }
        }
        if (!each.pages.memory) {
            return false;
        }
    }
    ranges_ = std::move(pinned);
    return true;
}

bool pinned_store::pin_staging(link & over, const direct_store & store, std::string & reason) {
    if (!staging_.pages.memory) {
        char * begin = store.staging();
        staging_     = { begin, begin + store.staging_bytes(), over.pin(begin, store.staging_bytes(), false, reason) };
    }
    return staging_.pages.memory != nullptr;
}

void pinned_store::unpin() {
    ranges_.clear();
    staging_ = {};
}

uint64_t pinned_store::bytes() const {
    uint64_t sum = staging_.pages.memory ? staging_.end - staging_.begin : 0;
    for (const range & each : ranges_) {
        sum += each.end - each.begin;
    }
    return sum;
}

const pinned_store::range * pinned_store::range_of(const stored_tensor & tensor) const {
    const auto after = std::upper_bound(ranges_.begin(), ranges_.end(), tensor.data,
                                        [](const char * data, const range & each) { return data < each.begin; });
    return after != ranges_.begin() && tensor.data < (after - 1)->end ? &*(after - 1) : nullptr;
}

const char * pinned_store::at(const stored_tensor & tensor, int32_t expert) const {
    const range * pinned = range_of(tensor);
    return pinned != nullptr ? (const char *) pinned->pages.memory.get() + (tensor.at(expert) - pinned->begin)
                             : nullptr;
}

const char * pinned_store::on_device(const stored_tensor & tensor) const {
    const range * pinned = range_of(tensor);
    return pinned != nullptr && pinned->pages.on_device != nullptr
               ? pinned->pages.on_device + (tensor.data - pinned->begin)
               : nullptr;
}

bool pinned_store::in_staging(const char * address) const {
    return staging_.pages.memory && address >= staging_.begin && address < staging_.end;
}

} // namespace rotary
