// SPDX-License-Identifier: MIT
//
// Link: finds and opens the library that moves experts to an inner device beside its computation (link_api.h); all
// pools on the device share it. Failures are this thread's error, or a reason that is returned.
// Threading: any thread.

#pragma once

#include "link/link_api.h"

#include "ggml-backend.h"

#include <memory>
#include <mutex>
#include <string>

namespace rotary {

class link {
  public:
    // The one link to a device; NULL if there is none, with a reason if such a device should have one. A device with a
    // link has events.
    static std::shared_ptr<link> to(ggml_backend_dev_t inner, std::string & reason);

    ~link();
    link(const link &)             = delete;
    link & operator=(const link &) = delete;

    // Page-locked host memory and its address on the device; empty with a reason on failure.
    struct pinned {
        std::shared_ptr<void> memory; // unpins, or frees, with the last copy
        char *                on_device = nullptr;
    };
    pinned pin(void * memory, size_t bytes, bool read_only,
               std::string & reason); // in place; `read_only`: try that first
    pinned new_pinned(size_t bytes, std::string & reason);

    // On the link's stream, see link_api.h. False with this thread's error.
    bool wait(ggml_backend_event_t event);
    bool record(ggml_backend_event_t event);
    bool copy(void * to, const void * from, size_t bytes);
    bool look_up(const rotary_link_lookup & lookup, const rotary_link_prediction * next);
    bool synchronize();

  private:
    link() = default;

    bool ok(bool done) const;

    template <class Call> bool enqueue(const Call & call);

    std::mutex              mutex_; // for calls that enqueue, so that the work of one call stays together
    ggml_backend_dev_t      inner_  = nullptr;
    const rotary_link_api * api_    = nullptr;
    rotary_link *           handle_ = nullptr;
    std::weak_ptr<link>     self_;
};

} // namespace rotary
