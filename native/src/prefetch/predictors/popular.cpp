// SPDX-License-Identifier: MIT
//
// Popular: the experts that the layer has chosen most often. Counts decay by 5 % with each token.

#include "prefetch/predictors/predictor.hpp"

namespace rotary {

namespace {

class popular : public scoring_predictor {
  public:
    explicit popular(const predictor_setting & setting) :
        scoring_predictor(setting.n_expert), count_(setting.n_layers, std::vector<double>(setting.n_expert, 0)) {}

    void note(int32_t layer, const int32_t * ids, int32_t n_used, int32_t n_tokens) override {
        static constexpr double keep = 0.95;

        for (int32_t i = 0; i < n_used * n_tokens; i++) {
            if (i % n_used == 0) {
                for (double & each : count_[layer]) {
                    each *= keep;
                }
            }
            count_[layer][ids[i]] += 1;
        }
    }

    void learn(int32_t layer, const float * popularity, const float *, const float *, int64_t) override {
        static constexpr double all = 20; // the count of an expert that every token uses, 1 / (1 - keep)

        for (int32_t expert = 0; expert < n_expert_; expert++) {
            count_[layer][expert] += all * popularity[expert];
        }
    }

    bool score(int32_t, int32_t ahead, std::vector<double> & score) override {
        score = count_[ahead];
        return true;
    }

  private:
    std::vector<std::vector<double>> count_; // [n_layers][n_expert]
};

} // namespace

std::unique_ptr<predictor> popular_new(const predictor_setting & setting) {
    return std::make_unique<popular>(setting);
}

} // namespace rotary
