// SPDX-License-Identifier: MIT
//
// Link. See link.hpp.

#include "link/link.hpp"

#include "base/error.hpp"
#include "base/fork.hpp"

#include "ggml-backend-impl.h"
#include "ggml-cpp.h"

#include <cstdlib>
#include <dlfcn.h>
#include <map>

namespace rotary {

// The link's library: beside our own, unless the environment names another.
static std::string link_library() {
    const char * given = getenv("ROTARY_LINK");
    if (given != nullptr && *given != '\0') {
        return given;
    }
    Dl_info about = {};
    if (dladdr((void *) link_library, &about) == 0 || about.dli_fname == nullptr) {
        return "libggml-rotary-cuda.so";
    }
    const std::string self = about.dli_fname;
    return self.substr(0, self.rfind('/') + 1) + "libggml-rotary-cuda.so";
}

// NULL with a reason if there is no such library or it has another ABI.
static const rotary_link_api * load_api(std::string & reason) {
    const std::string path   = link_library();
    void *            handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
        reason = format("%s: %s; build Rotary where nvcc is installed", path.c_str(), dlerror());
        return nullptr;
    }
    using get_t    = const rotary_link_api * (*)();
    const auto get = (get_t) dlsym(handle, "rotary_link_get");
    if (get == nullptr || get()->abi != ROTARY_LINK_ABI) {
        reason = format("%s: not a link of this version; install Rotary again", path.c_str());
        return nullptr;
    }
    return get(); // the library is never closed: the driver has threads in it
}

std::shared_ptr<link> link::to(ggml_backend_dev_t inner, std::string & reason) {
    static auto &                                            mutex = *new fork_mutex;
    static std::map<ggml_backend_dev_t, std::weak_ptr<link>> links;

    const std::string                 kind  = ggml_backend_reg_name(ggml_backend_dev_backend_reg(inner));
    const char *                      given = getenv("ROTARY_LINK");
    const std::lock_guard<std::mutex> lock(mutex);
    if (std::shared_ptr<link> known = links[inner].lock()) {
        return known;
    }
    if (kind != "CUDA" && (given == nullptr || *given == '\0')) {
        return nullptr;
    }
    const rotary_link_api * api = load_api(reason);
    if (api == nullptr || kind != api->kind) {
        return nullptr;
    }
    if (!ggml_backend_event_ptr(ggml_backend_event_new(inner))) {
        reason = format("%s: it has no events, as a CUDA backend that was built without peer copies",
                        ggml_backend_dev_name(inner));
        return nullptr;
    }
    ggml_backend_dev_props props = {};
    ggml_backend_dev_get_props(inner, &props);
    std::shared_ptr<link> opened(new link());
    char                  error[256] = "";
    opened->api_                     = api;
    opened->inner_                   = inner;
    opened->self_                    = opened;
    opened->handle_ = api->open(props.device_id != nullptr ? props.device_id : "", error, sizeof(error));
    if (opened->handle_ == nullptr) {
        reason = format("%s: %s", ggml_backend_dev_name(inner), error);
        return nullptr;
    }
    links[inner] = opened;
    return opened;
}

link::~link() {
    if (handle_ != nullptr) {
        api_->close(handle_);
    }
}

// Must not throw: copying threads and destructors call it.
bool link::ok(bool done) const {
    return done || guarded(false, [&] {
               fail(ROTARY_ERR_DEVICE,
                    format("%s: %s; load the model again", ggml_backend_dev_name(inner_), api_->error(handle_)));
               return false;
           });
}

// ok() runs without the mutex: it logs, and a log callback may call back.
template <class Call> bool link::enqueue(const Call & call) {
    std::unique_lock<std::mutex> lock(mutex_);
    const bool                   done = call();
    lock.unlock();
    return ok(done);
}

bool link::wait(ggml_backend_event_t event) {
    return enqueue([&] { return api_->wait(handle_, event->context); });
}

bool link::record(ggml_backend_event_t event) {
    return enqueue([&] { return api_->record(handle_, event->context); });
}

bool link::copy(void * to, const void * from, size_t bytes) {
    return enqueue([&] { return api_->copy(handle_, to, from, bytes); });
}

bool link::look_up(const rotary_link_lookup & lookup, const rotary_link_prediction * next) {
    return enqueue([&] { return api_->look_up(handle_, &lookup, next); });
}

bool link::synchronize() { // without the mutex: others may enqueue while this one waits
    return ok(api_->synchronize(handle_));
}

// `read_only` must be false for memory that is yet to be written: untouched pages would be pinned as zeros for good.
link::pinned link::pin(void * memory, size_t bytes, bool read_only, std::string & reason) {
    for (const rotary_pin how : { ROTARY_PIN_READ_ONLY, ROTARY_PIN_DEFAULT }) {
        if (how == ROTARY_PIN_READ_ONLY && !read_only) {
            continue;
        }
        void * on_device = api_->pin(handle_, memory, bytes, how);
        if (on_device != nullptr) {
            const auto unpin = [self = self_.lock()](void * pages) {
                self->api_->unpin(self->handle_, pages);
            };
            return { std::shared_ptr<void>(memory, unpin), (char *) on_device };
        }
        reason = api_->error(handle_);
    }
    return {};
}

link::pinned link::new_pinned(size_t bytes, std::string & reason) {
    void * on_device = nullptr;
    void * memory    = api_->host_new(handle_, bytes, &on_device);
    if (memory == nullptr) {
        reason = api_->error(handle_);
        return {};
    }
    const auto free = [self = self_.lock()](void * pages) {
        self->api_->host_free(self->handle_, pages);
    };
    return { std::shared_ptr<void>(memory, free), (char *) on_device };
}

} // namespace rotary
