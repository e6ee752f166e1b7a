// SPDX-License-Identifier: MIT
//
// ROTARY device: state. See device.hpp.

#include "ggml/device.hpp"

#include "base/error.hpp"
#include "base/inner_device.hpp"

#include <utility>

namespace rotary {

std::vector<std::unique_ptr<device>> & devices() {
    static auto & all = *new std::vector<std::unique_ptr<device>>; // never destroyed: models may outlive our statics
    return all;
}

bool is_device(int32_t index) {
    return index >= 0 && index < (int32_t) devices().size();
}

device * device_at(int32_t index) {
    if (is_device(index)) {
        return devices()[index].get();
    }
    fail(ROTARY_ERR_DEVICE, format("ROTARY%d: no such device; there are %zu; load the library into llama.cpp first",
                                   index, devices().size()));
    return nullptr;
}

bool is_rotary(ggml_backend_dev_t dev) {
    for (const auto & each : devices()) {
        if (each->handle() == dev) {
            return true;
        }
    }
    return false;
}

device::device(ggml_backend_reg_t reg, int index, ggml_backend_dev_t inner, const std::string & inner_name,
               const pool_config & environment) :
    handle_{ device_i, reg, this }, paged_device_{ paged_device_i, reg, this },
    paged_buft_{ paged_buft_i, &paged_device_, this }, name_("ROTARY" + std::to_string(index)),
    paged_name_("ROTARY_PAGED" + std::to_string(index)), environment_(environment) {
    wrap(inner, inner_name);
}

void device::wrap(ggml_backend_dev_t inner, const std::string & name) {
    inner_       = inner;
    inner_name_  = name;
    description_ = "expert paging over " + name + " (" + ggml_backend_dev_description(inner) + ")";
    extra_bufts_ = { &paged_buft_ };
    for (ggml_backend_buffer_type_t buft : inner_extra_bufts(inner)) {
        extra_bufts_.push_back(buft);
    }
    extra_bufts_.push_back(nullptr);
}

bool device::set_inner(ggml_backend_dev_t inner, const std::string & name) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (inner == inner_) {
        return true;
    }
    if (n_users_ > 0 || opened_) {
        return false;
    }
    wrap(inner, name);
    return true;
}

std::shared_ptr<pool> device::open_pool(const pool_config & config) {
    std::shared_ptr<pool>             before; // goes after the lock: a pool's end may wait for the inner device
    const std::lock_guard<std::mutex> lock(mutex_);
    before = std::exchange(opened_, std::make_shared<pool>(inner_, config));
    return opened_;
}

std::shared_ptr<pool> device::collecting_pool() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (opened_) {
        return opened_;
    }
    std::shared_ptr<pool> shared = from_environment_.lock();
    if (!shared) {
        shared            = std::make_shared<pool>(inner_, environment_);
        from_environment_ = shared;
    }
    return shared;
}

void device::stop_collecting(const pool * pool) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (opened_.get() == pool) {
        opened_.reset();
    }
}

uint64_t device::slot_bytes() const {
    std::shared_ptr<pool> opened, from_environment; // may be the last owners, so they go after the lock
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        opened           = opened_;
        from_environment = from_environment_.lock();
    }
    return (opened ? opened->stats().slot_bytes : 0) + (from_environment ? from_environment->stats().slot_bytes : 0);
}

bool device::paging() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return opened_ || environment_.model.wanted.what != budget::kind::off;
}

bool device::repack() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return opened_ ? opened_->model.config.repack : environment_.model.repack;
}

void device::remember_n_expert_used(const std::string & name, int32_t n) {
    const std::lock_guard<std::mutex> lock(mutex_);
    n_expert_used_[name] = n;
}

int32_t device::n_expert_used(const std::string & name) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto                        it = n_expert_used_.find(name);
    return it == n_expert_used_.end() ? 1 : it->second;
}

} // namespace rotary
