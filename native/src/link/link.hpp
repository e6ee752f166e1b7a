// SPDX-License-Identifier: MIT
//
// Link: the library that moves experts to an inner device beside its computation (link_api.h), found, opened and shared by
// everything on that device. Failures are this thread's error, or a reason that is given back.
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
    // The link to a device, one for all that ask; NULL if there is none, with a reason where one was to be expected. Its
    // device has events.
    static std::shared_ptr<link> to(ggml_backend_dev_t inner, std::string & reason);

    ~link();
    link(const link &)             = delete;
    link & operator=(const link &) = delete;

    // Pinned (page-locked) host memory and its address on the device; empty, with a reason, if it cannot be had.
    struct pinned {
        std::shared_ptr<void> memory; // unpins, or frees, with the last copy
        char *                on_device = nullptr;
    };
    pinned pin(void * memory, size_t bytes, bool read_only,
               std::string & reason); // where it is; read-only if it may be
    pinned new_pinned(size_t bytes, std::string & reason);

    // On the link's stream: link_api.h. False with this thread's error.
    bool wait(ggml_backend_event_t event);
    bool record(ggml_backend_event_t event);
    bool copy(void * to, const void * from, size_t bytes);
    bool look_up(const rotary_link_lookup & lookup, const rotary_link_prediction * next);
    bool synchronize();

  private:
    link() = default;

    bool ok(bool done) const;

    template <class Call> bool enqueue(const Call & call);

    std::mutex              mutex_; // of calls that enqueue: what one of them enqueues stays together
    ggml_backend_dev_t      inner_  = nullptr;
    const rotary_link_api * api_    = nullptr;
    rotary_link *           handle_ = nullptr;
    std::weak_ptr<link>     self_;
};

} // namespace rotary
