// SPDX-License-Identifier: MIT
//
// Pinned store: experts in page-locked host memory, in place or copied, so that copies run beside computation and the
// device can read them itself. Pinned memory is lost to all else on the machine, so unless the user asks for more, no
// more than three quarters of available memory are pinned.
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

    // Whether this many bytes may be pinned; false with the reason.
    bool may_pin(uint64_t bytes, std::string & reason) const;

    // Pin all experts of these tensors, or none with the reason. If the system refuses to pin them in place and the
    // policy is on, they are copied.
    bool pin(link & over, const std::vector<const stored_tensor *> & tensors, std::string & reason);

    // Pin the direct store's staging memory; false with the reason.
    bool pin_staging(link & over, const direct_store & store, std::string & reason);

    void     unpin();
    uint64_t bytes() const;

    // Address of an expert's pinned bytes in this process, and on the device; NULL if they are not pinned.
    const char * at(const stored_tensor & tensor, int32_t expert) const;
    const char * on_device(const stored_tensor & tensor) const; // of expert 0

    bool in_staging(const char * address) const;                // in pinned staging memory

  private:
    struct range {
        char *       begin;
        char *       end;
        link::pinned pages; // the same bytes, pinned
    };

    const range * range_of(const stored_tensor & tensor) const;

    pin_policy         policy_;
    std::vector<range> ranges_; // by address
    range              staging_ = {};
};

} // namespace rotary
