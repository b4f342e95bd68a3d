--- @include lib/enqueued_again
--- @include lib/time
--- @include lib/verdicts

-- An ended request that is to run again loses the TTL of its end. Its outputs, history and results live for a day
-- after each write, as for any living request. So if RQ's tools delete its job, nothing stays for ever.
local function live_again(id)
  redis.call('PERSIST', KEY.job .. id)
  for _, name in ipairs({ KEY.output, KEY.history, KEY.results }) do redis.call('EXPIRE', name .. id, DAY) end
end

-- Requests among these entries of a queue's list that have ended, and are to run again, lose the TTL of that end.
local function keep_requeued(queue, ids)
  for _, id in ipairs(ids) do
    local name = KEY.job .. id
    if redis.call('TTL', name) >= 0 then
      local v = redis.call('HMGET', name, 'task', 'last')
      local registry = ENDED[string.match(v[2] or '', ':(%a+)$')]
      local stands = registry and redis.call('ZSCORE', KEY[registry] .. queue, id)
      if v[1] and registry and (not stands or enqueued_again(read_dates(id))) then
        live_again(id)
      end
    end
  end
end
