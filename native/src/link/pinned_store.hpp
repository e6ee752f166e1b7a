// SPDX-License-Identifier: MIT
//
// Pinned store: experts in page-locked host memory, where they lie or in a copy, so that copies run beside computation and
// the device can read them itself. Pinned memory is lost to everything else on the machine, so it is never all taken
// unasked.
// Threading: none of its own; the pool locks.

#pragma once

#include "link/link.hpp"
#include "store/direct_store.hpp"
#include "store/stored_tensor.hpp"

#include <cstdint>
#include <string>
#include <vector>

namespace rotary {

enum class pin_policy { automatic, on, off };               // whether experts may be pinned

bool pin_parse(const std::string & text, pin_policy & pin); // "auto", "on", "off"

class pinned_store {
  public:
    explicit pinned_store(pin_policy policy) : policy_(policy) {}

    // Whether so much host memory may be pinned; else the reason.
    bool may_pin(uint64_t bytes, std::string & reason) const;

    // All experts of these tensors, or none, with the reason. Where the system refuses to pin them where they lie, they are
    // copied, if the policy is on.
    bool pin(link & over, const std::vector<const stored_tensor *> & tensors, std::string & reason);

    // The direct store's staging memory.
    bool pin_staging(link & over, const direct_store & store, std::string & reason);

    void     unpin();
    uint64_t bytes() const;

    // Addresses of an expert's pinned bytes: here, and as the device reads it; NULL if it is not pinned.
    const char * at(const stored_tensor & tensor, int32_t expert) const;
    const char * on_device(const stored_tensor & tensor) const; // of expert 0

    bool in_staging(const char * address) const;                // which is pinned

  private:
    struct range {
        char *       begin;
        char *       end;
        link::pinned pages; // the same bytes
    };

    const range * range_of(const stored_tensor & tensor) const;

    pin_policy         policy_;
    std::vector<range> ranges_; // in the order of their addresses
    range              staging_ = {};
};

} // namespace rotary
