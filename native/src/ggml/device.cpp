// SPDX-License-Identifier: MIT
//
// ROTARY device: state. See device.hpp.

#include "ggml/device.hpp"

#include "base/error.hpp"
#include "base/inner_device.hpp"
#include "ggml/inner.hpp"

#include <cstdlib>

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

static uint64_t env_bytes(const char * name) {
    budget       parsed;
    const char * text = getenv(name);
    return text != nullptr && budget_parse(text, parsed) && parsed.what == budget::kind::bytes ? (uint64_t) parsed.value
                                                                                               : 0;
}

static std::string env_text(const char * name) {
    const char * text = getenv(name);
    return text != nullptr ? text : "";
}

static bool env_on(const char * name) {
    const char * text = getenv(name);
    return text == nullptr || std::string(text) != "0";
}

// environment_is_valid() in registry.cpp has checked the texts.
static pool_config config_from_environment() {
    pool_config    config;
    model_config & model = config.model;
    if (const std::string text = env_text("ROTARY_BUDGET"); !text.empty()) {
        model.budget_text = text;
        budget_parse(text, model.wanted);
    }
    model.margin_bytes         = env_bytes("ROTARY_MARGIN");
    model.repack               = env_on("ROTARY_REPACK");
    model.compute_from_mapping = env_on("ROTARY_DIRECT");
    model.staging_bytes        = env_bytes("ROTARY_STAGING");
    model.adaptive             = env_text("ROTARY_SPLIT") != "even";
    config.prefetch.on         = env_on("ROTARY_PREFETCH");
    if (const std::string predictor = env_text("ROTARY_PREFETCH"); predictor_known(predictor)) {
        config.prefetch.predictor = predictor;
    }
    if (const std::string policy = env_text("ROTARY_POLICY"); !policy.empty()) {
        model.policy = policy;
    }
    pin_parse(env_text("ROTARY_PIN"), model.pin);
    store_parse(env_text("ROTARY_STORE"), model.store);
    return config;
}

device::device(ggml_backend_reg_t reg, int index, ggml_backend_dev_t inner, const std::string & inner_name) :
    handle_{ device_i, reg, this }, paged_device_{ paged_device_i, reg, this },
    paged_buft_{ paged_buft_i, &paged_device_, this }, name_("ROTARY" + std::to_string(index)),
    paged_name_("ROTARY_PAGED" + std::to_string(index)), environment_(config_from_environment()) {
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
    const std::lock_guard<std::mutex> lock(mutex_);
    opened_ = std::make_shared<pool>(inner_, config);
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
    const std::lock_guard<std::mutex> lock(mutex_);
    uint64_t                          sum = 0;
    for (const std::shared_ptr<pool> & each : { opened_, from_environment_.lock() }) {
        if (each) {
            sum += each->stats().slot_bytes;
        }
    }
    return sum;
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
