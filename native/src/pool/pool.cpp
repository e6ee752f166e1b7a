// SPDX-License-Identifier: MIT
//
// Pool. See pool.hpp.

#include "pool/pool.hpp"

#include "base/error.hpp"
#include "model/device_memory.hpp"
#include "model/rebalancing.hpp"
#include "store/loaded_weights.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace rotary {

pool::pool(ggml_backend_dev_t inner, const pool_config & config) :
    model(inner, config.model), predicted(model, config.prefetch), sizing_(model), governor_(model, sizing_),
    lock(model.inner_is_host(), [this] {
        model.transfer.abandon();
        self_ = weak_from_this().lock();
    }) {}

pool::~pool() {
    release();
}

// ---- loading

void pool::add_tensor(const void * owner, const ggml_tensor * tensor, int32_t n_expert_used, bool is_mapped) {
    const pool_lock::hold held(lock);
    if (sizing_.is_done()) {
        // Weights that come late, such as an adapter's: divide the budget anew at the next graph.
        model.notices.say(format("%s: %s was loaded after the slots were sized; slots start cold again",
                                 model.config.name.c_str(), tensor->name));
        release();
        model.transfer.pinned().unpin(); // sizing pins the new weights with the others
    }
    model.store.add(model.experts.add(owner, tensor, n_expert_used, is_mapped));
}

void pool::remove_owner(const void * owner) {
    const pool_lock::hold held(lock);
    if (lock.is_orphaned()) {
        forget_experts_of(owner);
        return;
    }
    release();
    model.transfer.pinned().unpin(); // sizing pins those that stay again
    model.store.remove_owner(owner);
    model.experts.remove_owner(owner);
}

bool pool::copy_out(const ggml_tensor * weight, void * data, size_t offset, size_t size) {
    const pool_lock::hold held(lock);
    return model.store.copy_out((const char *) weight->data, data, offset, size);
}

// ---- slots

// If an exception is thrown, slots are released, and the next call tries again.
int32_t pool::prepare() {
    if (lock.is_orphaned()) {
        return fail(
            ROTARY_ERR_STATE,
            format("%s: this process was forked %s, so it cannot be used here; load the model in this process",
                   model.config.name.c_str(),
                   model.inner_is_host() ? "while its parent computed with the model" : "after the model was loaded"));
    }
    if (n_lost_models_ > 0) {
        return fail(ROTARY_ERR_MEMORY,
                    format("%s: memory ran out while its experts were loaded, and not all are known; "
                           "close other programs, then load the model again",
                           model.config.name.c_str()));
    }
    if (sizing_.is_done() || model.experts.tensors().empty()) {
        return sizing_.status();
    }
    try {
        const int32_t status = sizing_.run();
        if (status == ROTARY_OK) {
            predicted.start();
            governor_.start();
        } else if (status == ROTARY_ERR_READ) {
            release(); // so that the next graph reads again
        }
        return status;
    } catch (...) {
        const int32_t status = fail_by_exception();
        return guarded(status, [&] {
            release();
            return status;
        });
    }
}

void pool::release() {
    if (!sizing_.is_done() || lock.is_orphaned()) {
        return;
    }
    for (ggml_backend_t user : users_) {
        ggml_backend_synchronize(user);
    }
    model.transfer.synchronize(); // the link may still copy prefetches into slots
    const char * print = getenv("ROTARY_STATS");
    if (print != nullptr && strcmp(print, "0") != 0) {
        model.stats.print(model.config.name, ggml_backend_dev_name(model.inner));
    }
    model.store.clear(); // first: waits for reads into slots
    model.tables.free();
    model.store.ram().free();
    model.lookup_memory.free();
    model.slots.free();
    model.experts.clear_layers();
    model.stats.set_layers({});
    model.stats.update([](rotary_stats & totals) { totals.slot_bytes = totals.ram_bytes = 0; });
    sizing_.release();
}

bool pool::begin_graph(ggml_backend_t user) {
    if (slots_invalid_ && !forget_slots()) {
        return false;
    }
    model.store.count_reads(); // first: after a reset of the counters, reads count from this graph on
    governor_.follow();
    rebalance(model, user);
    predicted.forget_guesses();
    return true;
}

bool pool::forget_slots() noexcept {
    slots_invalid_ = true;
    return guarded(false, [&] {
        model.store.clear();
        model.transfer.synchronize(); // lookups that were enqueued before the failure still change tables
        for (const auto & layer : model.experts.layers()) {
            if (layer->table) {
                layer->table->clear();
            }
        }
        model.tables.forget();
        slots_invalid_ = false;
        return true;
    });
}

// ---- settings

void pool::set_budget(const budget & wanted, const std::string & text) {
    release();
    model.config.wanted      = wanted;
    model.config.budget_text = text;
}

int32_t pool::fail_already_sized() const {
    return fail(ROTARY_ERR_STATE, format("%s: its slots are allocated; begin with another profile before that",
                                         model.config.name.c_str()));
}

int32_t pool::warm(int32_t il, std::vector<int32_t> experts) {
    return sizing_.is_done() ? fail_already_sized() : sizing_.fill().set(model, il, std::move(experts));
}

int32_t pool::learn(int32_t il, const float * popularity, const float * pairs, int32_t n_expert, int64_t n_tokens) {
    if (sizing_.is_done()) {
        return fail_already_sized();
    }
    predicted.learn(il, popularity, pairs, n_expert, n_tokens);
    return ROTARY_OK;
}

void pool::trace(bool on) {
    model.trace.enable(on);
    if (on && has_experts_on_device(model)) {
        model.notices.say(format("%s: while routings are recorded, the host resolves lookups, not %s; that is slower",
                                 model.config.name.c_str(), ggml_backend_dev_name(model.inner)));
    }
}

// ---- users

bool pool::add_user(ggml_backend_t user) {
    if (std::find(users_.begin(), users_.end(), user) != users_.end()) {
        return false;
    }
    // Backends of a shared pool wait for their own graphs, but a pool's only backend does not.
    for (ggml_backend_t other : users_) {
        ggml_backend_synchronize(other);
    }
    users_.push_back(user);
    return true;
}

void pool::remove_user(ggml_backend_t user) {
    const pool_lock::hold held(lock);
    if (!lock.is_orphaned()) {
        users_.erase(std::remove(users_.begin(), users_.end(), user), users_.end());
    }
}

// ---- figures

rotary_stats pool::stats() const {
    rotary_stats all = model.stats.all();
    all.n_notices    = model.notices.size();
    return all;
}

} // namespace rotary
